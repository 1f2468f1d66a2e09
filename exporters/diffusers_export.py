"""diffusers: the denoiser as a `DiTTransformer2DModel` inside a `DiTPipeline` folder, in fp32.

diffusers' DiT has one dense weight per layer. *single* and *union* fold to that, and so does *switch* where no matrix
kept a tailor; tailors picked by class have no place there and are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kind_edge.errors import InputError, UsageError
from kind_edge.registry import Arrays, ExportedFile, Interpreter

if TYPE_CHECKING:
    from kind_edge.deploy.plain import Origin, PlainDiT
    from kind_edge.model.spec import ModelSpec

FOLDER = "diffusers"

_FOLDED = "The class is folded into the weights, so there is no null branch to guide with: leave `guidance_scale` at 1."
_LATENTS = "The autoencoder is not part of this folder; with `vae=None` the transformer loads without one."
_DECODED = "`vae` is the autoencoder that was given, in float32."
_PIXELS = "The model works on pixels; `vae` passes them through."


@dataclass(frozen=True)
class DiffusersExporter:
    """Writes the folder `diffusers/`, whose `transformer/` is the model file of the bundle."""

    name: str = "diffusers"
    precisions: tuple[str, ...] = ("fp32",)

    def check(self, spec: ModelSpec) -> None:
        if spec.distilled:
            raise UsageError(
                "--formats diffusers: the model is distilled for a few steps and predicts for the span of a step, an "
                "input that DiTPipeline does not have; leave diffusers out, or export the model it was distilled from"
            )

    def export(self, model: PlainDiT, folder: Path, precisions: tuple[str, ...]) -> tuple[ExportedFile, ...]:
        if not precisions:
            raise UsageError("--formats diffusers: writes fp32 only; leave --precision out, or give fp32")
        self.check(model.spec)
        _pipeline(model).save_pretrained(folder / FOLDER)
        readme = folder / FOLDER / "README.md"
        readme.write_text(_readme(model.origin), encoding="utf-8")
        for weights in readme.parent.rglob("*.safetensors"):  # safetensors makes private files; a bundle's are ordinary
            weights.chmod(readme.stat().st_mode)
        path = f"{FOLDER}/transformer"
        return (ExportedFile(path, "fp32", {"role": "denoiser", "precision": "fp32", **_interface(model)}),)

    def open(self, path: Path) -> Interpreter:
        """Runs the transformer in PyTorch, as `from_pretrained` loads it."""
        import torch
        from diffusers import DiTTransformer2DModel

        try:
            model, found = DiTTransformer2DModel.from_pretrained(
                path, output_loading_info=True, local_files_only=True, low_cpu_mem_usage=False
            )
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise InputError(f"{path}: diffusers cannot load it: {error}") from error
        if faults := {what: names for what, names in found.items() if names}:
            raise InputError(f"{path}: diffusers loads it with faults: {faults}")

        def run(inputs: Arrays) -> Any:
            sample, timestep = torch.from_numpy(inputs["sample"]), torch.from_numpy(inputs["timestep"])
            labels = torch.zeros(len(sample), dtype=torch.long)
            if "class_index" in inputs:
                labels = torch.from_numpy(inputs["class_index"])
            with torch.no_grad():
                return model(sample, timestep=timestep, class_labels=labels).sample.numpy()

        return run


def _pipeline(model: PlainDiT) -> Any:
    import torch
    from diffusers import DiTPipeline, DiTTransformer2DModel

    from kind_edge.exporters import diffusers_parts as parts
    from kind_edge.model.convert import densify
    from kind_edge.model.dit_layouts import to_diffusers

    truncated, plan, spec = model.origin.truncated, model.origin.plan, model.spec
    if any(truncated.spec.ranks(matrix.name).tailor for matrix in spec.matrices()):
        raise UsageError(
            "--formats diffusers: its DiT has one weight per layer, and this plan (form switch) keeps tailors to pick "
            "from; export one class at a time with --form single --classes NAME, or all in one with --form union"
        )
    dense = densify(truncated)
    scheduler = parts.pipeline_scheduler(plan, spec.objective)
    if spec.timestep_frequency_shift == 0:
        steps = torch.cat([model.origin.timesteps.double(), scheduler.timesteps.double()]).unique()
        dense.tensors["t_embed.fc1.weight"] = parts.fitted_weight(dense.tensors["t_embed.fc1.weight"], steps)
    config, weights = to_diffusers(dense, parts.label_table(truncated, model.switches))
    transformer = DiTTransformer2DModel(**config)
    transformer.load_state_dict(weights)
    autoencoder = None
    if spec.pixels_per_latent == 1:
        autoencoder = parts.passthrough_autoencoder(spec.channels, spec.image_size)
    elif model.origin.autoencoder is not None:
        autoencoder = parts.pipeline_autoencoder(model.origin.autoencoder)
    names = dict(enumerate(plan.classes))
    pipeline = DiTPipeline(transformer, autoencoder, scheduler, names)
    pipeline.register_to_config(id2label=names)
    return pipeline


def _interface(model: PlainDiT) -> dict[str, Any]:
    """Inputs and outputs by the bundle's names; diffusers calls them hidden_states, timestep and class_labels."""
    spec = model.spec
    shape = ["batch", spec.channels, spec.image_size, spec.image_size]
    inputs = [("sample", "float32", shape), ("timestep", "float32", ["batch"])]
    inputs += [("class_index", "int64", ["batch"])] if model.switches else []
    return {
        "inputs": [{"name": name, "dtype": dtype, "shape": size} for name, dtype, size in inputs],
        "outputs": [{"name": "prediction", "dtype": "float32", "shape": [shape[0], spec.output_channels, *shape[2:]]}],
    }


def _readme(origin: Origin) -> str:
    plan, spec = origin.plan, origin.truncated.spec
    latent = spec.pixels_per_latent != 1 and origin.autoencoder is None
    autoencoder = ', vae=AutoencoderKL.from_pretrained("the one it was trained with")' if latent else ""
    labels = ", ".join(f"{index} {name}" for index, name in enumerate(plan.classes))
    guided = plan.form == "switch"
    notes = [
        f"Class labels: {labels}." if guided or len(plan.classes) == 1 else f"One model for all of: {labels}.",
        "Guidance finds its null class at label 1000." if guided else _FOLDED,
    ]
    if spec.timestep_frequency_shift == 0:
        notes.append(
            f"The timestep weights are fitted to diffusers' frequencies at {plan.steps} steps: take that number."
        )
    notes.append(f"Licence of the weights: {origin.lineage()['licence']}.")
    notes.append(_PIXELS if spec.pixels_per_latent == 1 else _LATENTS if latent else _DECODED)
    return f"""# A DiTPipeline of diffusers

```python
from diffusers import {"AutoencoderKL, " if latent else ""}DiTPipeline
pipeline = DiTPipeline.from_pretrained("."{autoencoder})
pipeline([0], guidance_scale={plan.guidance if guided else 1.0}, num_inference_steps={plan.steps}).images[0]
```

{chr(10).join(f"- {note}" for note in notes)}
"""


EXPORTER = DiffusersExporter()
