"""The families of objectives, one module each. `data.denoise` is their one door."""
