"""The pictures of the algorithms' pages: they must show what is true."""

import torch
from PIL import Image

from benchmark import draw_ideas


def spread(axes):
    return float(axes.get_xlabel().split(" ")[-1])


def test_only_the_corrected_noise_keeps_the_spread_of_the_data():
    figure = draw_ideas.draw_flow_grpo(num_points=1000)
    ode, wrong, sde, windows = figure.axes
    assert abs(spread(ode) - draw_ideas.SPREAD) < 0.02
    assert abs(spread(sde) - draw_ideas.SPREAD) < 0.02
    assert spread(wrong) > 1.5 * draw_ideas.SPREAD
    assert windows.collections[0].get_array().sum() == 12 * 2  # two steps per iteration


def test_the_velocity_of_the_clouds_points_from_a_cloud_to_the_noise():
    """At t = 0 it is minus x_0, since the mean of the noise is 0; at t = 1 it is the noise."""
    x_t = torch.tensor([[-1.5, 0.1], [1.6, 0.0]]).view(2, 2, 1, 1)
    torch.testing.assert_close(draw_ideas.velocity_at(x_t, 0.0), -x_t)
    torch.testing.assert_close(draw_ideas.velocity_at(x_t, 1.0), x_t)


def test_the_arrows_of_the_pairs_point_to_more_reward():
    for axes in draw_ideas.draw_fdfo().axes:
        (arrow,) = axes.texts
        assert arrow.xy[0] > arrow.xyann[0]


def test_the_middle_of_the_values_has_the_best_chance_and_the_most_images():
    chance, size, credit = draw_ideas.draw_superflow().axes
    for axes in (chance, size):
        y = axes.lines[0].get_ydata()
        assert y[200] == max(y) and y[0] == y[-1] == min(y)
    heights = [bar.get_height() for bar in credit.patches]
    assert abs(sum(heights) / len(heights) - 1) < 1e-5


def test_films_are_cut_below_a_whole_film():
    assert draw_ideas.first_films(Image.new("RGB", (50, 60)), count=2, films=6).size == (50, 20)
