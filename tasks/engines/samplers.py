"""Samplers by name: which diffusers scheduler each one is, and with which models it works."""

from typing import Any

from tasks.engines import SAMPLERS, EngineError

# What a model was trained to predict decides which samplers can use it. Flow-matching models (SD3, Flux) call their
# scheduler without the images' generators, so samplers that draw noise of their own would not be reproducible there.
FLOW_SAMPLERS = ("dpm++", "euler", "unipc")
NOT_FOR_SAMPLE_PREDICTION = ("plms", "euler_a")  # diffusers' classes know epsilon and v-prediction only


def is_flow(scheduler: dict[str, Any]) -> bool:
    """Whether a model with this scheduler configuration was trained by flow matching."""
    return scheduler["_class_name"].startswith("FlowMatch") or bool(scheduler.get("use_flow_sigmas"))


def working_samplers(scheduler: dict[str, Any]) -> tuple[str, ...]:
    """The samplers that work for a model with this scheduler configuration."""
    if is_flow(scheduler):
        return FLOW_SAMPLERS
    if scheduler.get("prediction_type") == "sample":
        return tuple(name for name in SAMPLERS if name not in NOT_FOR_SAMPLE_PREDICTION)
    return SAMPLERS


def check_sampler(sampler: str, scheduler: dict[str, Any], model: str) -> None:
    """Raises EngineError where the sampler does not work for the model."""
    working = working_samplers(scheduler)
    if sampler not in working:
        raise EngineError(f"sampler '{sampler}' does not work for model '{model}'; these do: {', '.join(working)}")


def build_sampler(sampler: str, scheduler: dict[str, Any]) -> Any:
    """A fresh diffusers scheduler, with the noise schedule and prediction type of the model's own configuration."""
    import diffusers

    if is_flow(scheduler):
        if sampler == "euler":
            return diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler, stochastic_sampling=False)
        flow = {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": scheduler.get("shift", scheduler.get("flow_shift", 1.0)),
        }
        if sampler == "dpm++":
            return diffusers.DPMSolverMultistepScheduler.from_config(scheduler, algorithm_type="dpmsolver++", **flow)
        return diffusers.UniPCMultistepScheduler.from_config(scheduler, **flow)

    schedulers: dict[str, tuple[Any, dict[str, Any]]] = {
        "ddpm": (diffusers.DDPMScheduler, {}),
        "ddim": (diffusers.DDIMScheduler, {}),
        "dpm++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
        "plms": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),  # PNDM without its Runge–Kutta start
        "euler": (diffusers.EulerDiscreteScheduler, {}),
        "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
        "unipc": (diffusers.UniPCMultistepScheduler, {}),
        "lcm": (diffusers.LCMScheduler, {}),
    }
    scheduler_class, more = schedulers[sampler]
    return scheduler_class.from_config(scheduler, **more)
