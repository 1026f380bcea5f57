from __future__ import annotations

import numpy as np
import pytest
import torch

from ddgen.grids import PADDING, enlargement, image_grid, to_pil


def test_images_run_row_by_row_and_unfilled_cells_are_white() -> None:
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    grid = np.asarray(image_grid(colours[:, :, None, None].expand(3, 3, 4, 6), 2, min_side=4))

    assert grid.shape == (2 * (4 + PADDING) + PADDING, 2 * (6 + PADDING) + PADDING, 3)
    second_row, second_column = 2 * PADDING + 4, 2 * PADDING + 6
    assert (grid[PADDING : PADDING + 4, PADDING : PADDING + 6] == [255, 0, 0]).all()
    assert (grid[PADDING : PADDING + 4, second_column : second_column + 6] == [0, 255, 0]).all()
    assert (grid[second_row : second_row + 4, PADDING : PADDING + 6] == [0, 0, 255]).all()
    assert (grid[second_row:, second_column:] == 255).all()


def test_enlargement_repeats_pixels_exactly() -> None:
    pixels = torch.randint(0, 256, (3, 5, 5), dtype=torch.uint8)
    large = np.asarray(to_pil(pixels, 3))
    expected = pixels.permute(1, 2, 0).repeat_interleave(3, 0).repeat_interleave(3, 1).numpy()
    np.testing.assert_array_equal(large, expected)
    assert [enlargement(side, 64) for side in (32, 28, 64, 256)] == [2, 3, 1, 1]


def test_fewer_images_than_columns_leave_no_empty_columns() -> None:
    assert image_grid(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), 10).width == 2 * 66 + 2


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(0, 3, 4, 4, dtype=torch.uint8)],
)
def test_anything_but_uint8_rgb_is_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(n, 3, h, w\)"):
        image_grid(wrong, 2)
