"""Curves of the training stages: both RL runs on common axes, then the cold start."""

from __future__ import annotations

from html import escape

from specs_fast.report.chart import Series, line_chart
from specs_fast.report.run_data import Run, Stage

# (title, metric key, note): one chart each, zero and final on the same axes.
RL_CHARTS = (
    ("Reward", "reward", "mean over the batch"),
    ("Accuracy reward", "rewards/accuracy/mean", "1 for a correct answer in the answer tag"),
    ("Format reward", "rewards/format/mean", "0.5 for the asked structure"),
    ("Entropy", "entropy", "nats per token"),
    ("Response length", "completions/mean_length", "tokens"),
    ("Groups without signal", "frac_reward_zero_std", "share whose rewards are all equal"),
    ("Cut off", "completions/clipped_ratio", "share that reached max_new_tokens"),
    ("Clipped tokens", "clip_ratio/region_mean", "share outside the trust region"),
    ("KL", "kl", "to the stage's first model, k3 estimate"),
    ("Loss", "loss", ""),
    ("Gradient norm", "grad_norm", "before clipping"),
    ("Sampler against trainer", "sampling/sampling_logp_difference/mean", "mean |difference| of log-probs"),
)
# (title, [(series title, metric key, colour)], note) of the cold start.
DPO_CHARTS = (
    (
        "Implicit rewards",
        (("chosen", "rewards/chosen", "good"), ("rejected", "rewards/rejected", "bad")),
        "beta × log-ratio",
    ),
    ("Margin", (("chosen − rejected", "rewards/margins", "coldstart"),), ""),
    ("Pairs ranked right", (("accuracy", "rewards/accuracies", "coldstart"),), "share of pairs"),
    ("Log-probs", (("chosen", "logps/chosen", "good"), ("rejected", "logps/rejected", "bad")), "sum over the response"),
    ("SFT term", (("chosen", "nll_loss", "good"),), "negative log-likelihood per token"),
    ("Loss", (("loss", "loss", "coldstart"),), ""),
    ("Entropy", (("entropy", "entropy", "coldstart"),), "nats per token"),
    ("Gradient norm", (("norm", "grad_norm", "coldstart"),), "before clipping"),
)
DRAWN_REWARDS = ("rewards/accuracy/mean", "rewards/format/mean")


def curves_section(run: Run) -> str:
    """Charts of every metric that was logged; a note for every stage that has none."""
    return _rl_html(run.stages["zero"], run.stages["final"]) + _dpo_html(run.stages["coldstart"])


def points_of(stage: Stage, key: str) -> list[tuple[float, float]]:
    """(step, value) of a metric; steps without it, or with null, are left out."""
    points = []
    for row in stage.metrics:
        step, value = row.get("step"), row.get(key)
        if isinstance(step, int | float) and isinstance(value, int | float):
            points.append((float(step), float(value)))
    return points


def _rl_html(zero: Stage, final: Stage) -> str:
    charts = []
    for title, key, note in (*RL_CHARTS, *_own_rewards(zero, final)):
        series = [Series(stage.name, stage.name, points_of(stage, key)) for stage in (zero, final)]
        if key in ("kl", "completions/clipped_ratio") and all(y == 0 for s in series for _, y in s.points):
            continue
        charts.append(line_chart(title, series, note))
    notes = "".join(_stage_note(stage) for stage in (zero, final))
    return f'<h3>RL: zero and final</h3>{notes}<div class="charts">{"".join(charts)}</div>'


def _own_rewards(*stages: Stage) -> list[tuple[str, str, str]]:
    """Charts for reward functions that a user brought."""
    keys = dict.fromkeys(key for stage in stages for row in stage.metrics[:1] for key in row)
    own = [key for key in keys if key.startswith("rewards/") and key.endswith("/mean") and key not in DRAWN_REWARDS]
    return [(f"Reward {key.split('/')[1]}", key, "mean over the batch") for key in own]


def _dpo_html(stage: Stage) -> str:
    charts = [
        line_chart(title, [Series(name, color, points_of(stage, key)) for name, key, color in series], note)
        for title, series, note in DPO_CHARTS
    ]
    return f'<h3>Cold start: DPO + SFT</h3>{_stage_note(stage)}<div class="charts">{"".join(charts)}</div>'


def _stage_note(stage: Stage) -> str:
    if stage.state == "absent":
        return f'<p class="missing">{escape(stage.name)}: not there yet.</p>'
    if stage.state == "running":
        return f'<p class="missing">{escape(stage.name)}: not finished; what was written so far.</p>'
    return "" if stage.metrics else f'<p class="missing">{escape(stage.name)}: no metrics.jsonl.</p>'
