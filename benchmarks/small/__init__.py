"""Programs whose steps are small: flatout beside what users do by hand, and beside JAX."""
