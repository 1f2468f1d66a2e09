"""`report.html`: what was asked, what was decided and why, what it looks like and what it costs. One file, no network.

Written from a bundle's manifest and pictures alone, so that it can be written again anywhere.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kind_edge.budget.words import FORM_WORDS, WRITE_LIMIT, coreml_words, distance_words, predicted_words, resize_words
from kind_edge.deploy.app_source import guidance_words, render
from kind_edge.deploy.mac_results import MacResults
from kind_edge.errors import InputError
from kind_edge.model.provenance import lineage_words
from kind_edge.units import format_bytes, format_flops, format_params, format_seconds, format_share

REPORT = "report.html"
FULL_PICTURE = "verify/full.png"
"""Pictures of the uncut model, from the same noise and in the same order as the preview."""

Row = tuple[str, ...]


def write_report(folder: Path, values: Mapping[str, Any], target: Path, on_mac: MacResults | None = None) -> None:
    """Write the report of the bundle in `folder`, whose manifest holds `values`, to `target`.

    `on_mac`: what its Core ML packages did on a Mac.
    Raises `InputError` for a manifest that says too little.
    """
    try:
        context = {**_context(folder, values), "on_mac": list(_on_mac(on_mac)) if on_mac else [],
                   "mac": list(on_mac.conditions.items()) if on_mac else []}  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder}: its manifest does not say all that a report shows ({error}); export again"
        ) from error
    target.write_text(render("report.html.j2", context, escape=True), encoding="utf-8")


def _context(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    plan, facts = values["plan"], values.get("report", {})
    latency = values["latency"]
    return {
        "name": values["name"],
        "classes": values["classes"],
        "asked": list(_asked(plan)),
        "decided": list(_decided(plan, values)),
        "costs": list(_costs(plan)),
        "reasons": list(_reasons(plan)),
        "pictures": [
            (title, _data_uri(folder / path))
            for title, path in (("This bundle", "preview.png"), ("The whole model, same noise", FULL_PICTURE))
            if (folder / path).is_file()
        ],
        "front": _front_drawing(facts.get("front", []), plan),
        "bars": [
            (f"{values['default_model']}", _bars(facts.get("bytes", {}), format_bytes)),
            (f"one image on {plan['profile']}, predicted, sustained", _bars(facts.get("seconds", {}), format_seconds)),
        ],
        "parity": list(_parity(values)),
        "by_class": _by_class(values),
        "packages": list(_packages(values)),
        "quality": list(_quality(values)),
        "quality_headers": ("", "images", *_quality_headers(values)),
        "healed": values.get("healing", {}).get("told") if values.get("healing", {}).get("kept") else None,
        "measured": list(_measured(values)),
        "conditions": list(_conditions(latency["image"]["conditions"], values)),
    }


def _asked(plan: Mapping[str, Any]) -> Iterator[Row]:
    yield "device", plan["profile"]
    yield "classes", ", ".join(plan["classes"])
    for name, limit in plan["limits"].items():
        binds = ": this limit binds" if name in plan["binding"] else ""
        yield name.replace("_", " ").replace("max", "at most"), f"{WRITE_LIMIT[name](limit)}{binds}"
    if not plan["limits"]:
        yield "limits", "none"


def _decided(plan: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Row]:
    yield from resize_words(plan.get("resize", {}))
    yield "form", FORM_WORDS[plan["form"]]
    yield "runs on", f"{plan['unit']}, {plan['precision']}"
    yield "sampler", f"{plan['steps']} {plan['sampler']} steps, {guidance_words(values)}"
    storages = [matrix["storage"] for matrix in plan["matrices"].values()]
    yield "matrices", ", ".join(f"{storages.count(kind)} {kind}" for kind in dict.fromkeys(storages))
    yield "modulation", "baked into a table" if plan["modulation"] != "network" else "kept as a network"
    yield "app loads", values["default_model"]
    yield from coreml_words(plan.get("coreml", {}))


def _costs(plan: Mapping[str, Any]) -> Iterator[Row]:
    """This plan beside the dense fp32 model of the same shape."""
    dense = plan["dense"]
    rows = (
        ("parameters", plan["params"], dense["params"], format_params),
        ("FLOPs per evaluation", plan["flops"], dense["flops"], format_flops),
        ("model file", plan["weight_bytes"], dense["weight_bytes"], format_bytes),
        ("peak memory, predicted", plan["peak_memory_bytes"], dense["peak_memory_bytes"], format_bytes),
        ("one image, sustained", plan["sustained_image_latency_s"], dense["latency_ns"] / 1e9, format_seconds),
    )
    for name, own, whole, write in rows:
        yield name, write(own), write(whole), format_share(own / whole) if whole else ""
    yield "one image, at first", format_seconds(plan["image_latency_s"]), "", ""


def _reasons(plan: Mapping[str, Any]) -> Iterator[str]:
    """Why it is this plan, in sentences."""
    if plan["optimality_gap"] is not None:
        least = "predicted loss of quality" if plan["minimised"] == "loss" else "cost"
        gap = round(plan["optimality_gap"], 6)
        yield f"No plan within the limits has a lower {least}{f' by more than {format_share(gap)}' if gap else ''}."
    if not plan["binding"]:
        yield "No limit keeps it from being better."
    if plan["form"] == "union":
        yield "What it costs to open several classes at once is in no prediction: look at the pictures."
    for name, price in plan["prices"].items():
        bought = _predicted(price.get("predicted_loss_increase"), price.get("predicted_frechet"))
        yield f"With a tenth more of {name.replace('max_', '')}, {WRITE_LIMIT[name](price['limit'])}: {bought}."
    yield f"Predicted for this plan: {_predicted(plan['predicted_loss_increase'], plan['predicted_frechet'])}."
    if plan.get("teacher_time") and plan.get("time"):
        longer = plan["teacher_time"]["image_s"] / plan["time"]["image_s"]
        yield f"The model it was distilled from would take {longer:.3g} x as long."
    yield f"Latencies for {plan['profile']} come from a {plan['latency_source']}."


def _predicted(increase: float | None, frechet: float | None) -> str:
    return "nothing is known of its quality" if increase is None else predicted_words(increase, frechet)


def _front_drawing(points: list[Mapping[str, Any]], plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """Positions in a box of 100 x 28 for predicted loss over size of the file, both logarithmic; None: no front."""
    known = [p for p in points if p["predicted_loss_increase"]]
    if len(known) < 2 or plan["predicted_loss_increase"] is None:
        return None
    own = {"weight_bytes": plan["weight_bytes"], "predicted_loss_increase": plan["predicted_loss_increase"]}
    floor = min(p["predicted_loss_increase"] for p in known) / 2  # a plan that loses nothing has no logarithm
    across = [math.log(p["weight_bytes"]) for p in (*known, own)]
    up = [math.log(max(p["predicted_loss_increase"], floor)) for p in (*known, own)]

    def placed(values: list[float], length: float) -> list[float]:
        low, high = min(values), max(values)
        return [round(length * (value - low) / (high - low or 1.0), 2) for value in values]

    places = list(zip(placed(across, 100), [28 - y for y in placed(up, 28)], strict=True))
    labels = [_point_label(p) for p in (*known, {**own, "predicted_frechet": plan["predicted_frechet"]})]
    rows = [_point_row(p) for p in known]
    headers: Row = ("model file", "predicted loss", "Fréchet distance", "steps", "one image, sustained")
    if not any(row[2] for row in rows):  # nobody has judged pictures of this model
        headers, rows = headers[:2] + headers[3:], [row[:2] + row[3:] for row in rows]
    drawn = {"line": places[:-1], "labels": labels[:-1], "own": places[-1], "own_label": labels[-1]}
    return {**drawn, "headers": headers, "rows": rows}


def _point_label(point: Mapping[str, Any]) -> str:
    return f"{format_bytes(point['weight_bytes'])}: " + _predicted(
        point["predicted_loss_increase"], point.get("predicted_frechet")
    )


def _point_row(point: Mapping[str, Any]) -> Row:
    distance = point.get("predicted_frechet")
    return (
        format_bytes(point["weight_bytes"]),
        f"+{format_share(point['predicted_loss_increase'])}",
        "" if distance is None else distance_words(distance),
        f"{point['steps']:.0f}",
        format_seconds(next(point[key] for key in ("sustained_image_latency_s", "image_latency_s") if key in point)),
    )


def _bars(parts: Mapping[str, float], write: Any) -> list[tuple[str, str, float]]:
    """Name, amount and width in per cent of each part, largest first."""
    whole = sum(parts.values()) or 1.0
    ordered = sorted(((name, size) for name, size in parts.items() if size > 0), key=lambda part: -part[1])
    return [
        (name, f"{write(size)}, {format_share(size / whole)}", round(100 * size / whole, 1)) for name, size in ordered
    ]


def _parity(values: Mapping[str, Any]) -> Iterator[Row]:
    found = values["verification"]
    for file, worst_db in found["parity"].items():
        entry = values["models"][file.partition("#")[0]]  # a function of a file has the file's entry
        what = "PSNR of the image" if entry["role"] in ("sampler", "decoder") else "SQNR"
        told = "none" if worst_db is None else f"{worst_db:.1f} dB"
        passed = worst_db is not None and worst_db >= found["gates"][file]
        yield file, entry["precision"], what, told, f"{found['gates'][file]:.0f} dB", "passed" if passed else "FAILED"


def _by_class(values: Mapping[str, Any]) -> dict[str, Any]:
    """Worst dB over the timesteps, by class (rows) and file (columns)."""
    points = values["verification"]["points"]
    worst: dict[str, dict[str, float]] = {}
    for file, found in points.items():
        for point in found:
            name, value = str(point.get("class", "every image")), point.get("sqnr_db", point.get("psnr_db"))
            if value is not None:
                row = worst.setdefault(name, {})
                row[file] = min(value, row.get(file, math.inf))
    rows = [(name, *(f"{row[file]:.1f}" if file in row else "" for file in points)) for name, row in worst.items()]
    return {"files": list(points), "rows": rows}


def _packages(values: Mapping[str, Any]) -> Iterator[Row]:
    """Every Core ML package: how it was made, its size beside the prediction and beside the fp32 ONNX file."""
    models, predicted = values["models"], values["plan"].get("coreml", {})
    for path, entry in models.items():
        if not path.startswith("coreml/"):
            continue
        size, expected = entry["package_bytes"], predicted.get(f"{entry['role']}_bytes")
        whole = values["latency"]["models"].get(f"onnx/{entry['role']}.onnx", {}).get("size_bytes")
        yield (
            path,
            ", ".join(entry[key] for key in ("precision", "target", "layout") if key in entry),
            format_bytes(size),
            "" if expected is None else format_bytes(expected),
            "" if not whole else format_share(size / whole),
        )


def _quality(values: Mapping[str, Any]) -> Iterator[Row]:
    for name, each in values.get("quality", {}).items():
        after, change = ("difference", "share") if "share" in each else ("plan", "increase")
        yield name, str(each["images"]), f"{each['full']:.4f}", f"{each[after]:.4f}", format_share(each[change])


def _quality_headers(values: Mapping[str, Any]) -> tuple[str, str, str]:
    """Of a distilled model the energy of what changed; of another its diffusion loss."""
    if any("share" in each for each in values.get("quality", {}).values()):
        return "energy of the prediction", "of the difference", "share"
    return "loss of the full model", "of this plan", "change"


def _measured(values: Mapping[str, Any]) -> Iterator[Row]:
    """Every model file here: size, latency beside the prediction for this machine, load, memory."""
    latency = values["latency"]
    for file, report in latency["models"].items():
        predicted_ms = latency["predicted_here_ms"].get(file)
        memory = report["peak_memory_bytes"]
        yield (
            file,
            format_bytes(report["size_bytes"]),
            *(format_seconds(report[key] / 1e3) for key in ("p50_ms", "p90_ms", "p99_ms")),
            "" if predicted_ms is None else format_seconds(predicted_ms / 1e3),
            format_seconds(report["cold_load_ms"] / 1e3),
            "" if memory is None else format_bytes(memory),
        )


def _on_mac(found: MacResults) -> Iterator[Row]:
    """Every package on every compute unit of the Mac; what failed is told in place of its figures."""
    for each in found.results:
        yield (
            each.package,
            each.unit,
            "" if each.worst_db is None else f"{each.worst_db:.1f} dB",
            f"{each.gate_db:.0f} dB",
            *("" if ms is None else format_seconds(ms / 1e3) for ms in (each.p50_ms, each.p90_ms)),
            *("" if load is None else format_seconds(load) for load in (each.cold_load_s, each.warm_load_s)),
            "passed" if each.passed else "FAILED",
            "; ".join(each.failures),
        )


def _conditions(here: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Row]:
    image = values["latency"]["image"]
    threads = (
        "all physical cores" if here["threads"] is None else f"{here['threads']} thread{'s' * (here['threads'] != 1)}"
    )
    yield "image here", f"{format_seconds(image['p50_ms'] / 1e3)} (p50 of {image['runs']})"
    yield "measured on", f"{here['cpu']} ({', '.join(here['instruction_sets'])}), {threads}, {here['system']}"
    yield "runtime", f"{here['runtime']}, {here['provider']}"
    yield "checkpoint", f"{values['source']['model']}, {values['source']['checkpoint_sha256']}"
    made_by = {**values["tools"], **{name: values[name] for name in ("revision",) if name in values}}
    yield "made by", ", ".join(f"{name.replace('_', '-')} {version}" for name, version in made_by.items())
    yield from lineage_words(values.get("provenance", {"licence": values["licence"]})).items()


def _data_uri(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
