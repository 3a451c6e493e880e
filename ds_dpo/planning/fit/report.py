"""A plan as a table for people, as JSON for programs, and as a picture of memory by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ds_dpo.config.run import RunConfig
from ds_dpo.planning.fit.gpus import Gpu
from ds_dpo.planning.fit.model_work import ModelWork
from ds_dpo.planning.fit.plan import MARGIN, Plan, Row
from ds_dpo.planning.fit.rank_memory import CONTEXT_BYTES, PARTS
from ds_dpo.planning.fit.step_time import Assumptions

COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#97bbf5", "#9c6b4e")
BAR_WIDTH, BAR_HEIGHT, LEFT, TOP = 600, 22, 290, 56


def named_rows(plan: Plan) -> dict[str, Row]:
    """Return the rows that a person looks at, by what they are; the best of each stage among them."""
    rows = {"as configured": plan.own}
    for name, row in (("fastest", plan.fastest), ("least memory", plan.leanest), ("fewest GPUs", plan.fewest)):
        if row is not None:
            rows[name] = row
    return rows


def plan_text(plan: Plan, work: ModelWork, config: RunConfig, gpu: Gpu, assumed: Assumptions) -> str:
    """Return the plan as a table, with what it assumes."""
    own = plan.own
    lines = [
        f"{config.model.pretrained}: {work.parameters:,} parameters, {work.trained_parameters:,} of them trained, "
        f"{config.data.resolution} px, {config.batch.pairs_per_step} pairs a step",
        f"{own.ranks} x {gpu.title}: {_gb(gpu.memory_bytes)} each, of which {MARGIN:.0%} stay free",
        "",
        f"{'':14}{'GPUs':>5}{'stage':>6}  {'reference':11}{'checkpointing':14}{'pairs at once':>13}{'memory':>11}"
        f"{'fits':>6}{'step':>12}{'whole run':>12}{'GPU hours':>11}",
    ]
    lines += [_line(name, row, config.max_train_steps) for name, row in named_rows(plan).items()]
    lines += ["", f"{'GB of a GPU':14}" + "".join(f"{part:>13}" for part in PARTS)]
    lines += [name.ljust(14) + _parts(row) for name, row in named_rows(plan).items()]
    lines += [""]
    if plan.fastest is None:
        lines.append(f"nothing fits on {own.ranks} of these GPUs{_way_out(plan)}")
    for name, row in named_rows(plan).items():
        if name != "as configured":
            lines.append(f"{name}: {row.choice.options(precision=plan.precision)}")
    lines += _left_out(work, config)
    on_disk = plan.checkpoint_bytes * plan.kept_checkpoints
    lines += [
        f"checkpoints: {_gb(plan.checkpoint_bytes)} each, {_gb(on_disk)} while one of them is written",
        f"work of a pair: {own.time.flop / (config.batch.pairs_per_step / own.ranks) / 1e12:.2f} TFLOP as configured",
        f"assumed: {assumed.utilization:.0%} of {gpu.flop_per_second / 1e12:.0f} TFLOP/s, "
        f"{gpu.link_bytes_per_second / 1e9:.0f} GB/s between GPUs of a host, "
        f"{assumed.network_bytes_per_second / 1e9:.0f} GB/s for each GPU between hosts, nothing overlapping, "
        f"{_gb(CONTEXT_BYTES)} for CUDA and its libraries; nothing is offloaded",
    ]
    return "\n".join(lines)


def _left_out(work: ModelWork, config: RunConfig) -> list[str]:
    """Return a line if the encoders' sizes are not known and the run has them on its GPUs."""
    has_encoders = config.data.cache is None or config.cadence.sample_every_steps is not None
    unknown = [name for name, size in (("VAE", work.vae_bytes), ("text encoders", work.text_bytes)) if not size]
    if not (has_encoders and unknown):
        return []
    return [
        f"left out: {' and '.join(unknown)} of {config.model.pretrained}, whose sizes are not known without its files; "
        "give a local folder as model.pretrained, or train from a cache (scripts/cache.py), which needs none of them"
    ]


def _way_out(plan: Plan) -> str:
    if plan.fewest is None:
        return "; train a LoRA (adapter.type lora), a smaller data.resolution, or offload (zero3_offload)"
    return f"; {plan.fewest.ranks} would do: {plan.fewest.choice.options(precision=plan.precision)}"


def _parts(row: Row) -> str:
    return "".join(f"{row.parts[part] / 1e9:13.2f}" for part in PARTS)


def _line(name: str, row: Row, steps: int) -> str:
    hours = row.time.seconds * steps / 3600
    return (
        f"{name:14}{row.ranks:>5}{row.choice.stage:>6}  {row.choice.residency:11}"
        f"{row.choice.checkpointing!s:14}{row.choice.micro_batch_pairs:>13}"
        f"{_gb(row.total_bytes):>11}{'yes' if row.fits else 'no':>6}{_seconds(row.time.seconds):>12}"
        f"{hours:>10.1f} h{hours * row.ranks:>11.1f}"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:,.0f} s"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def plan_fields(plan: Plan, work: ModelWork, config: RunConfig, gpu: Gpu, assumed: Assumptions) -> dict[str, Any]:
    """Return the plan as plain values: bytes, seconds and FLOP."""

    def row(found: Row | None) -> dict[str, Any] | None:
        if found is None:
            return None
        choice, time = found.choice, found.time
        return {
            "gpus": found.ranks,
            "stage": choice.stage,
            "residency": choice.residency,
            "gradient_checkpointing": choice.checkpointing,
            "micro_batch_pairs": choice.micro_batch_pairs,
            "bytes": dict(found.parts),
            "total_bytes": found.total_bytes,
            "fits": found.fits,
            "free_bytes": gpu.memory_bytes - found.total_bytes,
            "flop_per_step_and_gpu": time.flop,
            "sent_bytes_per_step": time.sent_bytes,
            "compute_seconds": time.compute_seconds,
            "communication_seconds": time.communication_seconds,
            "step_seconds": time.seconds,
            "gpu_hours": time.seconds * config.max_train_steps * found.ranks / 3600,
            "options": choice.options(precision=plan.precision),
        }

    return {
        "pretrained": config.model.pretrained,
        "gpu": {"title": gpu.title, "memory_bytes": gpu.memory_bytes, "flop_per_second": gpu.flop_per_second},
        "gpus": plan.own.ranks,
        "precision": plan.precision,
        "assumed": {**vars(assumed), "margin": MARGIN, "context_bytes": CONTEXT_BYTES},
        "parameters": work.parameters,
        "trained_parameters": work.trained_parameters,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "kept_checkpoints": plan.kept_checkpoints,
        "as_configured": row(plan.own),
        "fastest": row(plan.fastest),
        "least_memory": row(plan.leanest),
        "fewest_gpus": row(plan.fewest),
        "choices": [row(each) for each in plan.rows],
    }


def plan_picture(rows: Mapping[str, Row], gpu: Gpu, *, title: str) -> str:
    """Return an SVG: one bar for each row, its parts side by side, and a line where the GPU's memory ends."""
    most = max([gpu.memory_bytes, *(row.total_bytes for row in rows.values())])
    scale = BAR_WIDTH / most
    height = TOP + len(rows) * (BAR_HEIGHT + 14) + 64
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + BAR_WIDTH + 90}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="100%" height="100%" fill="white"/><text x="16" y="26" font-size="15">{escape(title)}</text>',
    ]
    for number, (name, row) in enumerate(rows.items()):
        parts += _bar(name, row, top=TOP + number * (BAR_HEIGHT + 14), scale=scale)
    end, bottom = LEFT + gpu.memory_bytes * scale, height - 60
    parts.append(
        f'<line x1="{end:.1f}" x2="{end:.1f}" y1="{TOP - 12}" y2="{bottom}" stroke="black" stroke-dasharray="4 3"/>'
        f'<text x="{end:.1f}" y="{TOP - 16}" text-anchor="middle">{escape(_gb(gpu.memory_bytes))}</text>'
    )
    parts += _legend(PARTS, top=height - 30)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(name: str, row: Row, *, top: float, scale: float) -> list[str]:
    gpus = "1 GPU" if row.ranks == 1 else f"{row.ranks} GPUs"
    label = f"{name}: {gpus}, ZeRO-{row.choice.stage}, {row.choice.micro_batch_pairs} at once"
    middle = top + BAR_HEIGHT / 2 + 4
    found = [f'<text x="{LEFT - 8}" y="{middle}" text-anchor="end">{escape(label)}</text>']
    left = float(LEFT)
    for part, color in zip(PARTS, COLORS, strict=True):
        width = row.parts[part] * scale
        found.append(
            f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{BAR_HEIGHT}" fill="{color}">'
            f"<title>{escape(part)} {_gb(row.parts[part])}</title></rect>"
        )
        left += width
    return [*found, f'<text x="{left + 6:.1f}" y="{middle}">{_gb(row.total_bytes)}</text>']


def _legend(parts: Sequence[str], *, top: float) -> list[str]:
    found = []
    for number, (part, color) in enumerate(zip(parts, COLORS, strict=True)):
        left = 16 + number * 112
        found.append(
            f'<rect x="{left}" y="{top - 10}" width="12" height="12" fill="{color}"/>'
            f'<text x="{left + 18}" y="{top}">{escape(part)}</text>'
        )
    return found
