"""What `d2ls predict` tells of its scenes: tables for people, lines of JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from d2ls_infer.cli.options import table

if TYPE_CHECKING:
    from d2ls_infer.batch import FailedScene
    from d2ls_infer.job import PredictResult
    from d2ls_infer.plan import Plan


def show(results: Iterable[PredictResult | Plan | FailedScene], scenes: int, *, as_json: bool, quiet: bool) -> None:
    """Tell each result as it comes, and at the end which scenes failed.

    Leaves with 1 if any did, with their code if all did for the like reasons. Of a single scene its error is raised.
    """
    from d2ls_infer.batch import FailedScene
    from d2ls_infer.plan import Plan

    failed: list[FailedScene] = []
    for result in results:
        if isinstance(result, FailedScene):
            failed.append(result)
            if scenes > 1:
                click.echo(f"Error: {one_line(result.error)}", err=True)
        if as_json:
            click.echo(json.dumps(event(result)))
        elif isinstance(result, Plan):
            click.echo(plan_text(result))
        elif not isinstance(result, FailedScene) and not quiet:
            click.echo(summary(result))
    if failed and scenes == 1:
        raise failed[0].error
    if failed:
        if not (quiet or as_json):
            rows = [[failure.source, one_line(failure.error)] for failure in failed]
            click.echo(f"\n{len(failed)} of {scenes} scenes failed:\n{table(['scene', 'why'], rows)}")
        codes = {failure.error.exit_code for failure in failed}
        sys.exit(codes.pop() if len(failed) == scenes and len(codes) == 1 else 1)


def one_line(error: BaseException) -> str:
    """An error's words, on one line."""
    return " ".join(str(error).split())


def event(result: PredictResult | Plan | FailedScene) -> dict[str, Any]:
    """What came of a scene, as JSON takes it; `status` says what it is."""
    from d2ls_infer.batch import FailedScene
    from d2ls_infer.plan import Plan

    if isinstance(result, FailedScene):
        error = result.error
        return {"status": "failed", "source": result.source, "error": one_line(error), "exit_code": error.exit_code}
    if isinstance(result, Plan):
        return {"status": "planned", **result.to_dict()}
    return {"status": "was there" if result.was_there else "mapped", **result.to_dict()}


def plan_text(plan: Plan) -> str:
    """What a run would do, a line each."""
    size = f"{plan.width} x {plan.height} pixels"
    down, across = plan.tiles
    seen = "" if plan.read_m is None or plan.read_m == plan.pixel_m else f", read at {plan.read_m:.3g} m"
    rows = [
        ["scene", size + (f" of {plan.pixel_m:.3g} m{seen}" if plan.pixel_m else "") + f", {plan.crs or 'no CRS'}"],
        ["bands", ", ".join(f"{name} = {band}" for name, band in plan.bands.items())],
        ["values", f"{plan.dtype}, {plan.scale}"],
        ["tiles", f"{down * across} ({down} x {across}) of {plan.tile_size} px, {plan.overlap_px} px overlap"],
        ["network", f"{plan.batch_size} tile{'s' * (plan.batch_size > 1)} at once on {plan.device}, {plan.precision}"],
        ["memory", "not known on this system" if plan.memory_bytes is None else f"about {size_of(plan.memory_bytes)}"],
        ["disk", f"at most {size_of(plan.disk_bytes)} of rasters"],
        ["time", f"about {duration(plan.seconds)} for the network"],
        *([name, str(path)] for name, path in plan.files.items()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([plan.source, *(f"  {name.ljust(width)}  {text}" for name, text in rows)])


def size_of(count: int) -> str:
    """Bytes, in megabytes or gigabytes."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds, or hours and minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def summary(result: PredictResult) -> str:
    """Where the map is, how long it took, and the areas of its classes."""
    if result.was_there:
        return f"{result.output}  (was there)"
    from d2ls_infer.outputs.areas import area_unit

    known = all(area.area_m2 is not None for area in result.areas)
    unit, size_m2 = area_unit(result.areas)
    rows = [
        [area.name, f"{(area.area_m2 or 0) / size_m2:,.2f}" if known else f"{area.pixels:,}", f"{100 * area.share:.1f}"]
        for area in result.areas
    ]
    skipped = f", {result.skipped} without valid pixels" if result.skipped else ""
    skipped += f", {result.resumed_rows} rows from an earlier run" if result.resumed_rows else ""
    others = [str(path) for name, path in result.files.items() if name != "classes"]
    lines = [f"{result.output}  ({result.tiles} tiles{skipped}, {result.seconds['total']:.1f} s)", *others]
    return "\n".join([*lines, table(["class", unit.replace("²", "2") if known else "pixels", "%"], rows, right=(1, 2))])
