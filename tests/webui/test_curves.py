from __future__ import annotations

from matplotlib.figure import Figure

from llamafactory_sekd.host.webui import add_distillation_axes


def loss_figure() -> Figure:
    figure = Figure()
    figure.add_subplot(111).plot([1, 2], [3.0, 2.0])
    return figure


def test_hard_share_and_difficulty_stand_below_the_loss_at_the_hosts_steps():
    figure = loss_figure()
    records = [
        {"current_steps": 5, "loss": 1.0, "kd/hard_ratio": 0.5, "kd/difficulty": 1.25},
        {"current_steps": 10, "loss": 0.9, "kd/hard_ratio": 0.25, "kd/difficulty": 1.0},
        {"current_steps": 10, "percentage": 100.0},  # the host's last record has no metrics
    ]
    add_distillation_axes(figure, records)
    loss, hard, difficulty = figure.axes
    figure.draw_without_rendering()
    assert loss.get_position().y0 > hard.get_position().y1
    assert hard.lines[0].get_xydata().tolist() == [[5, 50], [10, 25]]
    assert difficulty.lines[0].get_xydata().tolist() == [[5, 1.25], [10, 1.0]]


def test_the_nll_of_the_validation_is_drawn_over_the_loss_on_its_own_scale():
    figure = loss_figure()
    gate = {"kd/hard_ratio": 0.5, "kd/difficulty": 1.0}
    records = [{"current_steps": 1, "loss": 3.0, **gate}, {"current_steps": 1, "eval_loss": 2.5, "eval_kd/ce": 7.5}]
    records += [{"current_steps": 2, "loss": 2.0, **gate}, {"current_steps": 2, "eval_loss": 2.4, "eval_kd/ce": 7.0}]
    add_distillation_axes(figure, records)
    figure.draw_without_rendering()
    loss, nll = figure.axes[:2]
    assert nll.get_ylabel() == "NLL (nats per token)"
    assert nll.lines[0].get_xydata().tolist() == [[1, 7.5], [2, 7.0]]
    assert nll.get_position().bounds == loss.get_position().bounds
    assert nll.get_ylim()[0] > loss.get_ylim()[1]


def test_steps_are_integers_on_both_axes():
    figure = loss_figure()
    add_distillation_axes(
        figure, [{"current_steps": step, "kd/hard_ratio": 0.5, "kd/difficulty": 1.0} for step in (1, 2, 3)]
    )
    figure.draw_without_rendering()
    assert all(float(tick).is_integer() for axes in figure.axes for tick in axes.get_xticks())


def test_a_log_of_another_stage_leaves_the_hosts_figure_as_it_is():
    figure = loss_figure()
    before = figure.axes[0].get_position().bounds, tuple(figure.get_size_inches())
    add_distillation_axes(figure, [{"current_steps": 1, "loss": 1.0}])
    assert len(figure.axes) == 1
    assert (figure.axes[0].get_position().bounds, tuple(figure.get_size_inches())) == before
