"""Console report of a plan: tables of parameters, FLOPs, memory, tokens and caches, with advice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from t5x_like.planning.estimate.data_reads import verdict
from t5x_like.planning.estimate.memory import MemoryEstimate
from t5x_like.planning.estimate.parameters import total
from t5x_like.planning.memory_suggestions import MemorySuggestion
from t5x_like.planning.plan import Plan
from t5x_like.planning.sharding_table import ShardedArray
from t5x_like.utils import formatting
from t5x_like.utils.console import Console
from t5x_like.utils.sanitize import visible

_ORDER = ("embedding", "encoder", "decoder", "generator", "head")


def print_plan(plan: Plan, console: Console) -> None:
    """Print everything that needs no compilation."""
    axes = " x ".join(f"{axis}={size}" for axis, size in plan.program.mesh.shape.items() if size > 1)
    console.print(f"[bold]{escape(visible(plan.run.name))}[/] on {plan.machine}", highlight=False)
    console.print(f"mesh: {axes or 'one device'}", highlight=False)
    if plan.program.mesh_reason is not None:
        console.print(plan.program.mesh_reason, highlight=False, markup=False)
    console.print(f"attention: {plan.program.attention}", highlight=False, markup=False)
    console.print(_parameters(plan))
    _print_compute(plan, console)
    console.print(_memory(plan.memory))
    _print_verdict(plan, console)
    _print_tokens(plan, console)
    _print_cache(plan, console)
    _print_scaling(plan, console)


def print_shardings(parameters: Sequence[ShardedArray], activations: Sequence[ShardedArray], console: Console) -> None:
    """Print the sharding of each array and its bytes on a device, one line each, however long."""
    titles = (
        "parameters: path, shape, mesh axes of each dimension, bytes per device",
        "activations of a training step, as the model constrains them (layers of a scan once): method, shape, logical "
        "axes, mesh axes, number, bytes per device of one",
    )
    for title, arrays in zip(titles, (parameters, activations), strict=True):
        console.print(title, markup=False, highlight=False, style="bold")
        if not arrays:
            console.print("  none: there is one device")
        columns = [_columns(array) for array in arrays]
        widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
        for line in columns:
            padded = "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            console.print(f"  {padded}", markup=False, highlight=False, soft_wrap=True)
        console.print()


def _columns(array: ShardedArray) -> list[str]:
    shape, size = " x ".join(map(str, array.shape)), formatting.size(array.bytes_per_device)
    if not array.axes:
        return [array.name, shape, array.spec, size]
    return [array.name, shape, f"({array.axes})", array.spec, str(array.copies), size]


def refusal(plan: Plan, suggestions: Iterable[tuple[MemorySuggestion, MemoryEstimate | None]]) -> str:
    """Return the message that a run does not fit on this machine, with three suggestions and their estimates."""
    memory = plan.memory
    lines = [
        f"the step does not fit: found an estimated peak of {formatting.size(memory.peak_bytes)} per device, expected "
        f"at most {formatting.size(memory.usable_bytes)}. Change one of:"
    ]
    for suggestion, estimate in list(suggestions)[:3]:
        result = ""
        if estimate is not None:
            verdict = "fits" if estimate.fits else "not sufficient on its own"
            result = f": {formatting.size(estimate.peak_bytes)}, {verdict}"
        lines.append(f"  {suggestion}{result}")
    return "\n".join(lines)


def _table(*left: str, right: Sequence[str] = (), footer: bool = False) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_footer=footer)
    for name in left:
        table.add_column(name, overflow="fold", min_width=min(len(name), 12))
    for name in right:
        table.add_column(name, justify="right")
    return table


def _parameters(plan: Plan) -> Table:
    sums = total(plan.parts)
    has_inactive = sums.active != sums.count
    table = _table("parameters", right=("count", "", *(("active",) if has_inactive else ()), "bytes per device"))

    def order(name: str) -> tuple[int, str]:
        stack = name.split()[0]
        return (_ORDER.index(stack) if stack in _ORDER else len(_ORDER)), name

    for name in sorted(plan.parts, key=order):
        part = plan.parts[name]
        active = (f"{part.active:,}",) if has_inactive else ()
        table.add_row(
            name, f"{part.count:,}", formatting.count(part.count), *active, formatting.size(part.bytes_per_device)
        )
    active = (f"{sums.active:,}",) if has_inactive else ()
    table.add_section()
    table.add_row(
        "total", f"{sums.count:,}", formatting.count(sums.count), *active, formatting.size(sums.bytes_per_device)
    )
    if plan.trained != sums.count:
        table.add_row(
            "trained", f"{plan.trained:,}", formatting.count(plan.trained), *(("",) if has_inactive else ()), ""
        )
    return table


def _print_compute(plan: Plan, console: Console) -> None:
    compute = plan.compute()
    step = compute["flops_per_step"]
    table = _table("FLOPs per step (model FLOPs)", right=("forward and backward", "share"))
    for name, forward in compute["forward_parts"].items():
        table.add_row(name, formatting.flops(3 * forward), formatting.percent(3 * forward / step))
    table.add_section()
    table.add_row("total", formatting.flops(step), "")
    console.print(table)
    positions = sum(plan.tokens()["positions"].values())
    padded = ", padding of the vocabulary" if plan.run.model.vocab_padding_rows else ""
    lines = [
        f"{formatting.flops(compute['flops_per_token'])} per token, with {positions:,} token positions per step; the "
        f"rule 6 N D gives {formatting.flops(compute['six_n_d'])} per step ({compute['six_n_d'] / step:.0%})",
        f"the devices execute {formatting.flops(compute['executed_flops_per_step'])} per step "
        f"({compute['executed_flops_per_step'] / step:.0%}), with masked query-key pairs{padded} and recomputation",
    ]
    if compute["min_seconds_per_step"] is not None:
        seconds = compute["min_seconds_per_step"]
        lines.append(f"at the data sheet's peak this takes {seconds:.3g} s per step, a lower bound of the real time")
    if compute["cross_attention_flops"]:
        lines.append(
            f"encoder-decoder overhead: cross-attention adds {compute['cross_attention_flops']:.1%} to the FLOPs "
            f"and {compute['cross_attention_parameters']:.1%} to the parameters of everything else"
        )
    _print_lines(lines, console)


def _memory(memory: MemoryEstimate) -> Table:
    title = f"memory of a device at its highest moment ({memory.moment})"
    table = _table(title, right=("bytes", ""))
    for name, size in memory.parts.items():
        exact = "exact" if name in memory.state or name == "gradients" else "estimate"
        table.add_row(name, formatting.size(size), exact)
    table.add_section()
    table.add_row("peak", formatting.size(memory.peak_bytes), "estimate")
    return table


def _print_verdict(plan: Plan, console: Console) -> None:
    memory = plan.memory
    state = sum(memory.state.values())
    moments = ", ".join(
        f"{name} {formatting.size(state + sum(parts.values()))}" for name, parts in memory.moments.items()
    )
    lines = [f"moments of a step: {moments}"]
    if memory.fits is None:
        lines.append("the memory of these devices is not known, so whether the step fits cannot be said")
    else:
        left = memory.usable_bytes - memory.peak_bytes
        verdict = "fits" if memory.fits else "does not fit"
        lines.append(
            f"{verdict}: {formatting.size(memory.peak_bytes)} of {formatting.size(memory.usable_bytes)}, "
            f"{formatting.size(abs(left))} {'left' if left >= 0 else 'too much'} (compile for the exact number)"
        )
    if memory.host:
        parts = ", ".join(f"{name} {formatting.size(size)}" for name, size in memory.host.items())
        lines.append(f"memory of the host for each device: {parts}; {formatting.size(plan.host_bytes)} for each host")
    _print_lines(lines, console)


def _print_tokens(plan: Plan, console: Console) -> None:
    tokens = plan.tokens()
    positions = " and ".join(f"{count:,} of the {stack}" for stack, count in tokens["positions"].items())
    if not tokens["denoisers"]:
        _print_lines([f"token positions per step: {positions}; their content is determined by seqio"], console)
        return
    table = _table("denoiser", "sub-batch", right=("rows", "raw tokens", "loss tokens", "loss / raw", "share of loss"))
    for each in tokens["denoisers"]:
        table.add_row(
            escape(each["name"]),
            each["sub_batch"],
            f"{each['rows']:.4g}",
            f"{each['raw_tokens']:,.0f}",
            f"{each['loss_tokens']:,.0f}",
            f"{each['loss_tokens'] / each['raw_tokens']:.2f}",
            formatting.percent(each["loss_tokens"] / tokens["loss"]),
        )
    table.add_section()
    table.add_row(
        "per step",
        "",
        f"{plan.run.training.global_batch_size}",
        f"{tokens['raw']:,.0f}",
        f"{tokens['loss']:,.0f}",
        f"{tokens['loss'] / tokens['raw']:.2f}",
        "",
    )
    console.print(table)
    lines = [f"token positions per step: {positions}"]
    if (reads := plan.reads()) is not None:
        lines.append(verdict(reads))
    _print_lines(lines, console)


def _print_cache(plan: Plan, console: Console) -> None:
    cache = plan.cache()
    if cache is None:
        return
    parts = [f"{formatting.size(cache['per_token'])} per token"]
    if cache["window"]:
        parts.append(f"{formatting.size(cache['window'])} per row for the windows of local layers")
    if cache["per_source_token"]:
        parts.append(f"{formatting.size(cache['per_source_token'])} per encoder token, computed once")
    row = cache["row"]
    source = f" and {row['encoder_length']} encoder tokens" if row["encoder_length"] else ""
    lines = [
        f"KV cache in {cache['dtype']}: {', '.join(parts)}; with int8 "
        f"{formatting.size(cache['per_token_int8'])} per token",
        f"a row of {row['length']} tokens{source}: {formatting.size(cache['per_row'])} over all devices",
    ]
    _print_lines(lines, console)


def _print_scaling(plan: Plan, console: Console) -> None:
    scaling = plan.scaling()
    n, d = scaling["parameters"], scaling["tokens"]
    lines = [
        f"{plan.run.training.num_train_steps:,} steps: {formatting.flops(scaling['flops'])}, {formatting.count(d)} raw "
        f"tokens, {d / n:.3g} for each of {formatting.count(n)} parameters"
    ]
    for optimum in scaling["optima"]:
        best_n, best_d = optimum["parameters"], optimum["tokens"]
        lines.append(
            f"compute-optimal for these FLOPs: {formatting.count(best_n)} parameters and {formatting.count(best_d)} "
            f"tokens ({best_d / best_n:.3g} each) by {optimum['source']}"
        )
    lines += [
        f"this size is compute-optimal at {formatting.count(scaling['tokens_for_these_parameters'])} tokens, "
        f"{scaling['steps_for_these_parameters']:,.0f} steps, by the refit; more tokens give a better model at the "
        "same serving cost",
        scaling["caveat"],
    ]
    _print_lines(lines, console)


def _print_lines(lines: Iterable[str], console: Console) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False)
    console.print()
