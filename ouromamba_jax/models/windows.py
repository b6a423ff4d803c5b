"""Maps cut into square windows, each a sample of its own: there, back, and the order of their tokens."""

from dataclasses import dataclass

from jaxtyping import Array, Float

from ouromamba_jax.models.trace import ScanOrder


def split_windows(x: Float[Array, "B H W C"], window: int) -> Float[Array, "BW L C"]:
    """Square windows, row by row, as samples; their tokens row by row. H and W are multiples of `window`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels).swapaxes(2, 3)
    return x.reshape(-1, window * window, channels)


def join_windows(x: Float[Array, "BW L ..."], window: int, grid: tuple[int, int]) -> Float[Array, "B H W ..."]:
    """The inverse of `split_windows` for maps of `grid` tokens, rounded up to whole windows."""
    rows, columns = (-(-size // window) for size in grid)
    x = x.reshape(-1, rows, columns, window, window, *x.shape[2:]).swapaxes(2, 3)
    return x.reshape(x.shape[0], rows * window, columns * window, *x.shape[5:])


@dataclass(frozen=True, kw_only=True)
class WindowOrder(ScanOrder):
    """Tokens of one window, row by row; samples are the windows of all images, row by row, image after image.

    `to_image` gives a window's tokens in row-major order. The map of (map_height, map_width) tokens was padded right
    and below to whole windows.
    """

    map_height: int
    map_width: int

    def join(self, x: Float[Array, "BW L ..."]) -> Float[Array, "B M ..."]:
        """Windows in scan order to the tokens of whole maps in row-major order, without the padding."""
        x = join_windows(self.to_image(x), self.height, (self.map_height, self.map_width))
        x = x[:, : self.map_height, : self.map_width]
        return x.reshape(x.shape[0], -1, *x.shape[3:])
