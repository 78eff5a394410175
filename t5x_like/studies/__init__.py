"""Studies: several runs that answer one question. Their runs are ordinary run directories."""
