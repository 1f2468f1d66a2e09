"""What a DiTPipeline needs beside the matrices: labels, timestep weights, scheduler, autoencoder."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kind_edge.errors import UsageError
from kind_edge.model.autoencoder import latent_statistics, load_autoencoder
from kind_edge.model.diffusion import TRAIN_STEPS
from kind_edge.model.dit import timestep_features, timestep_frequencies
from kind_edge.model.sampling import make_scheduler

if TYPE_CHECKING:
    from kind_edge.budget.plan import Plan
    from kind_edge.model.autoencoder import Autoencoder
    from kind_edge.model.checkpoint import Checkpoint

NULL_LABEL = 1000
"""Where DiTPipeline looks for the null class, whatever the number of classes."""

_FIT_TOLERANCE = 3e-6
"""Relative error of the timestep network's first layer; parity at 100 dB allows 1e-5 of the prediction."""

_CARRIER = 256.0


def label_table(truncated: Checkpoint, switches: bool) -> Tensor:
    """One row per label, [1001, D]: kept classes first, then null up to row 1000.

    A folded model has one label for all, kept where the null label was. A model without labels gets zeros.
    """
    spec = truncated.spec
    if spec.num_classes > NULL_LABEL:
        raise UsageError(
            f"--formats diffusers: {spec.num_classes} classes, but DiTPipeline has its null class at {NULL_LABEL}; "
            "keep fewer --classes"
        )
    if not spec.label_embedding:
        return torch.zeros(NULL_LABEL + 1, spec.width)
    labels = truncated.tensors["y_embed.weight"].float()
    named = labels[:-1] if switches else labels[-1:]
    return torch.cat([named, labels[-1:].expand(NULL_LABEL + 1 - len(named), -1)])


def fitted_weight(weight: Tensor, timesteps: Tensor) -> Tensor:
    """fc1's weight [D, 256] for diffusers' frequencies: the same outputs at `timesteps` [S].

    diffusers spaces the frequencies a little wider (10000^(-i/127)), and no weights make up for that at every timestep.
    At a sampler's own steps they do: the smallest change that is exact there. Elsewhere it is as good as diffusers' own
    conversion of DiT, which changes nothing at all. `UsageError` where the steps are too many for 256 features.
    """
    ours, theirs = (timestep_features(timesteps, timestep_frequencies(shift)).double() for shift in (0, 1))
    wanted = ours @ weight.double().T
    change = torch.linalg.lstsq(theirs, wanted - theirs @ weight.double().T, rcond=1e-9, driver="gelsd").solution
    fitted = (weight.double() + change.T).float()
    error = (theirs @ fitted.double().T - wanted).norm() / wanted.norm()
    if error > _FIT_TOLERANCE:
        raise UsageError(
            f"--formats diffusers: its timestep frequencies cannot reproduce this model at {len(timesteps)} timesteps "
            f"(relative error {error:.0e}); use fewer --steps, 40 or less"
        )
    return fitted


def pipeline_scheduler(plan: Plan, objective: str) -> Any:
    """The plan's sampler as a scheduler that DiTPipeline can drive, with its timesteps set.

    The pipeline's loop knows nothing of the objective: it hands the prediction to the scheduler. diffusers' own
    flow-matching schedulers lack a method that it calls; DPM-Solver++ with flow sigmas has it, and of first order it is
    Euler's step.
    """
    if objective == "epsilon":
        return make_scheduler(plan.sampler, objective, plan.steps)
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=TRAIN_STEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        solver_order=1 if plan.sampler == "euler" else 2,
    )
    scheduler.set_timesteps(plan.steps)
    return scheduler


def pipeline_autoencoder(autoencoder: Autoencoder) -> Any:
    """What was given, as DiTPipeline uses it: the pipeline divides latents by `scaling_factor` and knows nothing else.

    A shift, or means and deviations, go into the convolution before the decoder, which only `AutoencoderKL` has.
    """
    model = load_autoencoder(autoencoder.folder)
    channels = int(model.config.latent_channels)
    shift, spread = (torch.tensor(values).expand(channels) for values in latent_statistics(model.config))
    if bool((spread == 1).all() and (shift == 0).all()):
        return model
    if autoencoder.kind != "AutoencoderKL":
        raise UsageError(
            f"--formats diffusers: DiTPipeline cannot shift latents as this {autoencoder.kind} wants it; leave "
            "diffusers out"
        )
    before = torch.nn.Conv2d(channels, channels, 1).requires_grad_(False)
    own, bias = torch.eye(channels), torch.zeros(channels)
    if model.post_quant_conv is not None:
        own, bias = model.post_quant_conv.weight.flatten(1), model.post_quant_conv.bias
    before.weight.copy_((own * spread)[:, :, None, None])
    before.bias.copy_(bias + own @ shift)
    model.post_quant_conv = before
    model.register_to_config(use_post_quant_conv=True, shift_factor=None, latents_mean=None, latents_std=None)
    return model


def passthrough_autoencoder(channels: int, image_size: int) -> Any:
    """An `AutoencoderKL` whose decoder and encoder return their input, up to about 1e-4: for models of pixels.

    Residual blocks of zeros pass everything on. The normalisation at the end divides by the spread of all channels: two
    constant channels of +-256 make that a constant too. Its SiLU is undone by silu(x) - silu(-x) = x.
    """
    from diffusers import AutoencoderKL

    wide = 2 * channels + 2
    autoencoder = AutoencoderKL(
        in_channels=channels, out_channels=channels, latent_channels=channels, block_out_channels=(wide,),
        layers_per_block=1, norm_num_groups=1, sample_size=image_size, scaling_factor=1.0, force_upcast=False,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    ).eval()  # fmt: skip
    for parameter in autoencoder.requires_grad_(False).parameters():
        parameter.zero_()
    for half in (autoencoder.encoder, autoencoder.decoder):
        for c in range(channels):
            half.conv_in.weight[c, c, 1, 1], half.conv_in.weight[channels + c, c, 1, 1] = 1.0, -1.0
            half.conv_out.weight[c, c, 1, 1], half.conv_out.weight[c, channels + c, 1, 1] = 1.0, -1.0
        half.conv_in.bias[2 * channels], half.conv_in.bias[2 * channels + 1] = _CARRIER, -_CARRIER
        half.conv_norm_out.weight[: 2 * channels] = _CARRIER / math.sqrt(channels + 1)
    autoencoder.encoder.conv_out.bias[channels:] = -30.0  # log-variance: none
    return autoencoder
