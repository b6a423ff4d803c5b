"""Pure functions of arrays: scans, splits, products, attention; each with the backends it can run on."""
