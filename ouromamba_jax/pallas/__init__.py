"""GPU kernels in Pallas (Mosaic GPU), behind the dispatch points of `matmul` and `scan`; one file per kernel."""

__all__: list[str] = []
