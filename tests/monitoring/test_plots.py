import math

import pytest

from phsa_megatron.monitoring.plots import Curves, Line, draw_curves, draw_heat_map, draw_layer_bars, thin


def test_a_short_curve_is_not_thinned():
    assert thin([1, 2, 3], [3.0, 1.0, 2.0]) == [(1, 3.0, 3.0, 3.0), (2, 1.0, 1.0, 1.0), (3, 2.0, 2.0, 2.0)]


def test_a_long_curve_keeps_its_means_and_its_spike():
    values = [1.0] * 10_000
    values[5_003] = 50.0
    points = thin(list(range(10_000)), values, max_points=100)
    assert len(points) == 100
    assert max(point[3] for point in points) == 50.0
    assert sum(mean for _, mean, _, _ in points) / 100 == pytest.approx(sum(values) / 10_000)


def test_non_finite_values_leave_a_gap_and_spoil_no_neighbour():
    points = thin([1, 2, 3, 4], [1.0, math.nan, math.inf, 4.0], max_points=2)
    assert [point[1] for point in points] == [1.0, 4.0]
    (gap,) = thin([1, 2], [math.nan, math.inf], max_points=1)
    assert gap[0] == 1.5 and math.isnan(gap[1])


def test_a_drawing_is_an_svg_with_text_and_the_colours_of_the_page():
    line = Line("training", list(range(2_000)), [1 / (step + 1) for step in range(2_000)])
    svg = draw_curves(Curves("demo", "nats/token", [line, line], {"unigram": 0.5}, [3], log_scale=True))
    assert svg.startswith('<svg viewBox="') and svg.rstrip().endswith("</svg>")
    for text in (
        ">training<",
        ">nats/token<",
        "unigram 0.5",
        "var(--series-1)",
        "var(--series-2)",
        'id="demo-',
    ):
        assert text in svg, text


def test_the_same_numbers_give_the_same_drawing():
    curves = Curves("demo", "1", [Line("a", [1, 2], [1.0, 2.0], marked=True)])
    assert draw_curves(curves) == draw_curves(curves)


def test_bars_and_heat_map_name_layers_and_hold_no_link():
    bars = draw_layer_bars("bars", [1, 2, 3], {"selected": [0.1, 0.2, 0.3], "attended": [0.4, 0.4, 0.4]})
    assert ">selected<" in bars and ">attended<" in bars and ">layer<" in bars
    heat = draw_heat_map("heat", [100, 200], [1, 2], [[0.1, 0.2], [math.nan, 0.4]])
    assert 'xlink:href="data:image/png;base64,' in heat and ">200<" in heat


def test_many_layers_and_domains_can_be_drawn():
    layers = list(range(1, 65))
    assert ">61<" in draw_layer_bars("bars", layers, {"selected": [0.1] * 64})
    lines = [Line(f"domain_{number}", [1, 2], [1.0, 2.0], marked=True) for number in range(9)]
    assert "domain_8" in draw_curves(Curves("domains", "nats", lines))
