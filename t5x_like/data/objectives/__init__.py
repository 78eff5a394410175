"""NumPy halves of the objectives, one module each. `registry` has `denoise` and `restore` for all of them."""
