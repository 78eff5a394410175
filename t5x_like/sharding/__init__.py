"""Device mesh, logical axis rules and the shardings derived from them. Knows no model code and no data pipeline."""
