"""The mesh, the logical rules and the shardings that follow from them. Knows no model and no data."""
