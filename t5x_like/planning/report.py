"""A plan for people: tables of parameters, operations, memory, tokens and caches, and what they advise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from t5x_like.monitoring import formats
from t5x_like.monitoring.text import visible
from t5x_like.planning.knobs import Knob
from t5x_like.planning.memory import MemoryEstimate
from t5x_like.planning.parameters import total
from t5x_like.planning.plan import Plan
from t5x_like.planning.shardings import Row

_ORDER = ("embedding", "encoder", "decoder", "generator", "head")


def print_plan(plan: Plan, console: Console) -> None:
    """Prints everything that needs no compilation."""
    axes = " x ".join(f"{axis}={size}" for axis, size in plan.program.mesh.shape.items() if size > 1)
    console.print(f"[bold]{escape(visible(plan.run.name))}[/] on {plan.machine}", highlight=False)
    console.print(f"mesh: {axes or 'one device'}", highlight=False)
    if plan.program.mesh_reason is not None:
        console.print(plan.program.mesh_reason, highlight=False, markup=False)
    console.print(_parameters(plan))
    _print_compute(plan, console)
    console.print(_memory(plan.memory))
    _print_verdict(plan, console)
    _print_tokens(plan, console)
    _print_cache(plan, console)
    _print_scaling(plan, console)


def print_shardings(parameters: Sequence[Row], activations: Sequence[Row], console: Console) -> None:
    """Prints how each array is split, and its bytes on a device: a line each, however long."""
    titles = (
        "parameters: path, shape, mesh axes of each dimension, bytes per device",
        "activations of a training step, as the model constrains them (a scan's layers once): where, shape, logical "
        "axes, mesh axes, how many, bytes per device of one",
    )
    for title, rows in zip(titles, (parameters, activations), strict=True):
        console.print(title, markup=False, highlight=False, style="bold")
        if not rows:
            console.print("  none: one device holds everything")
        cells = [_cells(row) for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            padded = "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            console.print(f"  {padded}", markup=False, highlight=False, soft_wrap=True)
        console.print()


def _cells(row: Row) -> list[str]:
    shape, size = " x ".join(map(str, row.shape)), formats.size(row.bytes_per_device)
    if not row.axes:
        return [row.name, shape, row.spec, size]
    return [row.name, shape, f"({row.axes})", row.spec, str(row.copies), size]


def refusal(plan: Plan, turned: Iterable[tuple[Knob, MemoryEstimate | None]]) -> str:
    """Why a run is not started on this machine, and three knobs with what they would make of it."""
    memory = plan.memory
    lines = [
        f"the step does not fit: an estimated peak of {formats.size(memory.peak_bytes)} per device, expected at most "
        f"{formats.size(memory.usable_bytes)}. Turn one of:"
    ]
    for knob, estimate in list(turned)[:3]:
        result = ""
        if estimate is not None:
            verdict = "fits" if estimate.fits else "not enough alone"
            result = f": {formats.size(estimate.peak_bytes)}, {verdict}"
        lines.append(f"  {knob}{result}")
    return "\n".join(lines)


def _table(*left: str, right: Sequence[str] = (), footer: bool = False) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=footer)
    for name in left:
        table.add_column(name, overflow="fold", min_width=min(len(name), 12))
    for name in right:
        table.add_column(name, justify="right")
    return table


def _parameters(plan: Plan) -> Table:
    sums = total(plan.parts)
    experts = sums.active != sums.count
    table = _table("parameters", right=("count", "", *(("active",) if experts else ()), "bytes per device"))

    def place(name: str) -> tuple[int, str]:
        return (_ORDER.index(name.split()[0]) if name.split()[0] in _ORDER else len(_ORDER)), name

    for name in sorted(plan.parts, key=place):
        part = plan.parts[name]
        active = (f"{part.active:,}",) if experts else ()
        table.add_row(name, f"{part.count:,}", formats.count(part.count), *active, formats.size(part.bytes_per_device))
    active = (f"{sums.active:,}",) if experts else ()
    table.add_section()
    table.add_row("total", f"{sums.count:,}", formats.count(sums.count), *active, formats.size(sums.bytes_per_device))
    if plan.trained != sums.count:
        table.add_row("trained", f"{plan.trained:,}", formats.count(plan.trained), *(("",) if experts else ()), "")
    return table


def _print_compute(plan: Plan, console: Console) -> None:
    compute = plan.compute()
    step = compute["flops_per_step"]
    table = _table("operations of a step (model FLOPs)", right=("forward and backward", "share"))
    for name, forward in compute["forward_parts"].items():
        table.add_row(name, formats.flops(3 * forward), formats.percent(3 * forward / step))
    table.add_section()
    table.add_row("total", formats.flops(step), "")
    console.print(table)
    cells = sum(plan.tokens()["cells"].values())
    lines = [
        f"{formats.flops(compute['flops_per_cell'])} per token of {cells:,} in a step; 6 N D would say "
        f"{formats.flops(compute['six_n_d'])} a step ({compute['six_n_d'] / step:.0%})",
        f"the devices run {formats.flops(compute['executed_flops_per_step'])} a step "
        f"({compute['executed_flops_per_step'] / step:.0%}): pairs that are masked, and what is computed again",
    ]
    if compute["least_seconds_per_step"] is not None:
        seconds = compute["least_seconds_per_step"]
        lines.append(f"at the peak of the data sheet that is {seconds:.3g} s; no step is faster, real ones take longer")
    if compute["cross_attention_flops"]:
        lines.append(
            f"encoder-decoder premium: cross-attention adds {compute['cross_attention_flops']:.1%} to the operations "
            f"and {compute['cross_attention_parameters']:.1%} to the parameters of everything else"
        )
    _print_lines(lines, console)


def _memory(memory: MemoryEstimate) -> Table:
    title = f"memory of a device at its highest moment ({memory.moment})"
    table = _table(title, right=("bytes", ""))
    for name, size in memory.parts.items():
        exact = "exact" if name in memory.state or name == "gradients" else "estimate"
        table.add_row(name, formats.size(size), exact)
    table.add_section()
    table.add_row("peak", formats.size(memory.peak_bytes), "estimate")
    return table


def _print_verdict(plan: Plan, console: Console) -> None:
    memory = plan.memory
    state = sum(memory.state.values())
    moments = ", ".join(f"{name} {formats.size(state + sum(parts.values()))}" for name, parts in memory.moments.items())
    lines = [f"moments of a step: {moments}"]
    if memory.fits is None:
        lines.append("the memory of these devices is not known: whether it fits is for you to say")
    else:
        left = memory.usable_bytes - memory.peak_bytes
        verdict = "fits" if memory.fits else "does not fit"
        lines.append(
            f"{verdict}: {formats.size(memory.peak_bytes)} of {formats.size(memory.usable_bytes)}, "
            f"{formats.size(abs(left))} {'left' if left >= 0 else 'too much'} (compiling says it exactly)"
        )
    _print_lines(lines, console)


def _print_tokens(plan: Plan, console: Console) -> None:
    tokens = plan.tokens()
    cells = " and ".join(f"{count:,} of the {stack}" for stack, count in tokens["cells"].items())
    if not tokens["denoisers"]:
        _print_lines([f"cells of a step: {cells}; what they hold is seqio's to say"], console)
        return
    table = _table("denoiser", "sub-batch", right=("rows", "raw tokens", "loss tokens", "loss / raw", "of the loss"))
    for each in tokens["denoisers"]:
        table.add_row(
            escape(each["name"]),
            each["sub_batch"],
            f"{each['rows']:.4g}",
            f"{each['raw_tokens']:,.0f}",
            f"{each['loss_tokens']:,.0f}",
            f"{each['loss_tokens'] / each['raw_tokens']:.2f}",
            formats.percent(each["loss_tokens"] / tokens["loss"]),
        )
    table.add_section()
    table.add_row(
        "a step",
        "",
        f"{plan.run.training.batch_size}",
        f"{tokens['raw']:,.0f}",
        f"{tokens['loss']:,.0f}",
        f"{tokens['loss'] / tokens['raw']:.2f}",
        "",
    )
    console.print(table)
    _print_lines([f"cells of a step: {cells}"], console)


def _print_cache(plan: Plan, console: Console) -> None:
    cache = plan.cache()
    if cache is None:
        return
    parts = [f"{formats.size(cache['per_token'])} per token"]
    if cache["window"]:
        parts.append(f"{formats.size(cache['window'])} per row for the local layers' windows")
    if cache["per_source_token"]:
        parts.append(f"{formats.size(cache['per_source_token'])} per token of the encoder, once")
    row = cache["row"]
    source = f" and {row['encoder_length']} of the encoder" if row["encoder_length"] else ""
    lines = [
        f"keys and values in {cache['dtype']}: {', '.join(parts)}; as int8 {formats.size(cache['per_token_int8'])} per "
        "token",
        f"a row of {row['length']} tokens{source}: {formats.size(cache['per_row'])} over all devices",
    ]
    _print_lines(lines, console)


def _print_scaling(plan: Plan, console: Console) -> None:
    scaling = plan.scaling()
    n, d = scaling["parameters"], scaling["tokens"]
    lines = [
        f"{plan.run.training.num_train_steps:,} steps: {formats.flops(scaling['flops'])}, {formats.count(d)} raw "
        f"tokens, {d / n:.3g} for each of {formats.count(n)} parameters"
    ]
    for optimum in scaling["optima"]:
        best_n, best_d = optimum["parameters"], optimum["tokens"]
        lines.append(
            f"these operations are best spent on {formats.count(best_n)} parameters and {formats.count(best_d)} tokens "
            f"({best_d / best_n:.3g} each) by {optimum['source']}"
        )
    lines += [
        f"this size is compute-optimal at {formats.count(scaling['tokens_for_these_parameters'])} tokens, "
        f"{scaling['steps_for_these_parameters']:,.0f} steps, by the refit; more tokens than that make a model that is "
        "better and as cheap to serve",
        scaling["caveat"],
    ]
    _print_lines(lines, console)


def _print_lines(lines: Iterable[str], console: Console) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False)
    console.print()
