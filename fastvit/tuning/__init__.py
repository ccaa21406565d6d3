"""Tools that measure and compile kernels: tile tables, compile reports, FLOPs."""
