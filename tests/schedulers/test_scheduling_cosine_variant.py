"""The noise schedule against its formulas, swaps for other schedulers, and min-SNR weights."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from brics_diffusers.schedulers import scheduling_cosine_variant
from brics_diffusers.schedulers.min_snr import min_snr_weights
from brics_diffusers.schedulers.scheduling_cosine_variant import (
    GAMMA_SCHEDULES,
    CosineVariantScheduler,
    schedule_alpha_bar,
    schedule_gamma,
)


PORTABLE_KEYS = (
    "num_train_timesteps",
    "trained_betas",
    "prediction_type",
    "thresholding",
    "sample_max_value",
    "clip_sample",
    "clip_sample_range",
    "timestep_spacing",
    "variance_type",
)


@pytest.fixture
def warnings(monkeypatch):
    """What the scheduler warns of."""
    warnings = []
    monkeypatch.setattr(scheduling_cosine_variant.logger, "warning", warnings.append)
    return warnings


def swap_class(name):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde", reason="DPMSolverSDEScheduler needs torchsde")
    return getattr(diffusers, name)


def alpha_bar_at(scheduler, timestep):
    """alpha-bar at a train step that need not be an integer (second-order solvers visit such), by log-SNR."""
    alpha_bar = scheduler.alphas_cumprod.double().numpy()
    log_snr = np.interp(float(timestep), np.arange(len(alpha_bar)), np.log(alpha_bar / (1 - alpha_bar)))
    return torch.tensor(1 / (1 + np.exp(-log_snr)))


def point_mass_model(target):
    """The exact epsilon prediction where every clean sample is `target`."""
    return lambda x, alpha_bar: (x - alpha_bar.sqrt() * target) / (1 - alpha_bar).sqrt()


def gaussian_model(mean, std):
    """The exact epsilon prediction for clean samples from N(mean, std**2)."""

    def predict(x, alpha_bar):
        variance = alpha_bar * std**2 + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * mean) / variance

    return predict


def denoise(scheduler, model, num_inference_steps, shape, error=0.0):
    """The loop of a diffusers pipeline; `error` is the standard deviation of noise added to each prediction."""
    generator = torch.Generator().manual_seed(0)
    train_scheduler = CosineVariantScheduler()
    scheduler.set_timesteps(num_inference_steps)
    step_kwargs = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, timestep).double()
        prediction = model(model_input, alpha_bar_at(train_scheduler, timestep)).float()
        prediction = prediction + error * torch.randn(shape, generator=generator)
        x = scheduler.step(prediction, timestep, x, **step_kwargs).prev_sample
    return x


def reload(scheduler, folder, cls=CosineVariantScheduler, **kwargs):
    scheduler.save_pretrained(folder)
    return cls.from_pretrained(folder, **kwargs)


def test_gamma_of_the_cosine_variant():
    times = np.array([0.1, 0.25, 0.5, 0.75, 0.9])
    expected = [0.86115, 0.61554, 0.23607, 0.03430, 0.00229]
    np.testing.assert_allclose(schedule_gamma(times, "cosine_variant"), expected, atol=5.1e-6)


@pytest.mark.parametrize("gamma_schedule", GAMMA_SCHEDULES)
def test_gamma_falls_from_one_to_zero(gamma_schedule):
    gamma = schedule_gamma(np.linspace(0, 1, 257), gamma_schedule)
    assert gamma.dtype == np.float64
    assert gamma[0] == 1 and abs(gamma[-1]) < 1e-30
    assert (np.diff(gamma) < 0).all()


def test_gamma_returns_the_kind_it_was_given():
    assert type(schedule_gamma(0.5, "linear")) is float
    assert schedule_gamma(np.full((2, 3), 0.5), "cosine").shape == (2, 3)


def test_gamma_has_no_nan_where_rounding_passes_the_quarter_turn():
    for start in np.linspace(0, 0.9, 91):
        assert np.isfinite(schedule_gamma(np.linspace(0, 1, 101), "cosine_variant", start=float(start))).all()


@pytest.mark.parametrize("num_train_timesteps", [1, 2, 50, 1000, 4000])
@pytest.mark.parametrize("gamma_schedule", GAMMA_SCHEDULES)
def test_alpha_bar_stays_in_its_range_and_strictly_falls(gamma_schedule, num_train_timesteps):
    scheduler = CosineVariantScheduler(num_train_timesteps, gamma_schedule=gamma_schedule)
    alpha_bar = scheduler.alphas_cumprod
    assert alpha_bar.dtype == torch.float32 and alpha_bar.shape == (num_train_timesteps,)
    assert alpha_bar.double().min() >= 1e-6 and alpha_bar.double().max() <= 0.9999
    assert (alpha_bar.diff() < 0).all()
    assert alpha_bar[-1].item() == pytest.approx(1e-6, rel=1e-6)
    assert (scheduler.betas > 0).all() and (scheduler.betas < 1).all()


@pytest.mark.parametrize("gamma_schedule", GAMMA_SCHEDULES)
def test_alpha_bar_is_the_plain_formula(gamma_schedule):
    plain = np.clip([schedule_gamma((i + 1) / 1000, gamma_schedule) for i in range(1000)], 1e-6, 0.9999)
    inside = (plain > 1.02e-6) & (plain < 0.98)
    alpha_bar = CosineVariantScheduler(gamma_schedule=gamma_schedule).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(alpha_bar[inside], plain[inside], rtol=1e-7)
    np.testing.assert_allclose(alpha_bar, plain, rtol=1.1e-4)  # 10 clipped neighbours, 1e-5 each
    np.testing.assert_allclose(schedule_alpha_bar(1000, gamma_schedule), alpha_bar, rtol=1e-7)


@pytest.mark.parametrize("reloaded", [False, True], ids=["fresh", "reloaded"])
@pytest.mark.parametrize("name", CosineVariantScheduler._compatibles)
def test_swap_keeps_the_diffusion_process(name, reloaded, tmp_path):
    cls = swap_class(name)
    scheduler = CosineVariantScheduler()
    if reloaded:
        scheduler = reload(scheduler, tmp_path)
    swapped = cls.from_config(scheduler.config)

    assert torch.equal(swapped.betas, torch.tensor(scheduler.config.trained_betas))
    torch.testing.assert_close(swapped.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-5, atol=0)
    assert (swapped.alphas_cumprod.diff() < 0).all()
    for key in PORTABLE_KEYS:
        assert swapped.config[key] == scheduler.config[key], key

    for back in (
        CosineVariantScheduler.from_config(swapped.config),
        CosineVariantScheduler.from_config(reload(swapped, tmp_path / "swapped", cls).config),
    ):
        assert torch.equal(back.alphas_cumprod, scheduler.alphas_cumprod)
        assert back.config.gamma_schedule == "cosine_variant" and back.config.thresholding


def test_swap_keeps_arguments_other_than_the_defaults():
    scheduler = CosineVariantScheduler(
        500, gamma_schedule="linear", prediction_type="v_prediction", thresholding=False, timestep_spacing="leading"
    )
    swapped = diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config)
    for key in PORTABLE_KEYS:
        assert swapped.config[key] == scheduler.config[key], key
    assert CosineVariantScheduler.from_config(swapped.config).config.gamma_schedule == "linear"


@pytest.mark.parametrize("gamma_schedule", GAMMA_SCHEDULES)
def test_reloaded_scheduler_is_the_same_bit_for_bit(gamma_schedule, tmp_path):
    scheduler = CosineVariantScheduler(gamma_schedule=gamma_schedule)
    reloaded = reload(scheduler, tmp_path)
    for name in ("betas", "alphas", "alphas_cumprod", "timesteps"):
        assert torch.equal(getattr(scheduler, name), getattr(reloaded, name)), name
    ours, theirs = dict(scheduler.config), dict(reloaded.config)
    theirs.pop("_diffusers_version")
    ours.pop("_diffusers_version", None)
    assert ours == theirs
    assert isinstance(reloaded.config.trained_betas, list) and isinstance(reloaded.config.trained_betas[0], float)


def test_foreign_betas_are_honoured():
    betas = np.linspace(1e-4, 0.02, 1000)
    theirs = diffusers.DDPMScheduler(trained_betas=betas)
    ours = CosineVariantScheduler.from_config(theirs.config)
    assert torch.equal(ours.betas, theirs.betas)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=0)


def test_config_without_betas_gives_the_default_schedule():
    theirs = diffusers.DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    ours = CosineVariantScheduler.from_config(theirs.config)
    assert torch.equal(ours.alphas_cumprod, CosineVariantScheduler().alphas_cumprod)
    assert ours.config.prediction_type == "v_prediction"


def test_asking_for_another_schedule_drops_the_saved_betas(tmp_path):
    scheduler = CosineVariantScheduler()
    linear = CosineVariantScheduler(gamma_schedule="linear")
    for changed in (
        CosineVariantScheduler.from_config(scheduler.config, gamma_schedule="linear"),
        reload(scheduler, tmp_path, gamma_schedule="linear"),
    ):
        assert torch.equal(changed.alphas_cumprod, linear.alphas_cumprod)
    assert len(CosineVariantScheduler.from_config(scheduler.config, num_train_timesteps=20).betas) == 20
    same = CosineVariantScheduler.from_config(scheduler.config, tau=1.5, prediction_type="sample")
    assert torch.equal(same.alphas_cumprod, scheduler.alphas_cumprod)


def test_zero_snr_rescaling_happens_once_in_a_swap():
    scheduler = CosineVariantScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert scheduler.alphas_cumprod[-1] == 0
    swapped = diffusers.DDIMScheduler.from_config(scheduler.config)
    torch.testing.assert_close(swapped.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("timestep_spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("num_inference_steps", [1000, 250, 50])
def test_sampling_recovers_a_point_mass(num_inference_steps, timestep_spacing):
    target = torch.linspace(-1, 1, 32, dtype=torch.float64).view(2, 1, 4, 4)
    scheduler = CosineVariantScheduler(timestep_spacing=timestep_spacing)
    sample = denoise(scheduler, point_mass_model(target), num_inference_steps, target.shape)
    torch.testing.assert_close(sample.double(), target, atol=1e-3, rtol=0)


# With few steps the last one goes from a noise level of the order of `std` straight to the mean, so `std` shrinks.
@pytest.mark.parametrize("num_inference_steps, tolerance", [(1000, 0.015), (250, 0.03), (50, 0.07)])
def test_sampling_recovers_a_gaussian(num_inference_steps, tolerance):
    sample = denoise(CosineVariantScheduler(), gaussian_model(0.3, 0.2), num_inference_steps, (4, 4, 16, 16))
    assert sample.mean().item() == pytest.approx(0.3, abs=0.01)
    assert sample.std().item() == pytest.approx(0.2, abs=tolerance)


def test_dpm_solver_recovers_a_point_mass_in_20_steps():
    target = torch.linspace(-1, 1, 32, dtype=torch.float64).view(2, 1, 4, 4)
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(CosineVariantScheduler().config)
    sample = denoise(scheduler, point_mass_model(target), 20, target.shape)
    assert scheduler.timesteps[0] == 999
    torch.testing.assert_close(sample.double(), target, atol=1e-3, rtol=0)


# PNDM and LMS have neither clipping nor thresholding, and extrapolate: an error in epsilon at alpha-bar 1e-6 carries
# through, and all that can be promised is finite numbers.
UNCLIPPED = {"PNDMScheduler", "LMSDiscreteScheduler"}


@pytest.mark.parametrize(
    "name, num_inference_steps",
    [(name, 20) for name in CosineVariantScheduler._compatibles]
    + [("DPMSolverMultistepScheduler", 250), ("DPMSolverMultistepScheduler", 1000), ("UniPCMultistepScheduler", 250)],
)
def test_every_swap_samples_with_an_imperfect_model(name, num_inference_steps):
    scheduler = swap_class(name).from_config(CosineVariantScheduler().config)
    sample = denoise(scheduler, gaussian_model(0.3, 0.2), num_inference_steps, (2, 4, 16, 16), error=0.05)
    assert sample.isfinite().all()
    if name not in UNCLIPPED:
        assert sample.mean().item() == pytest.approx(0.3, abs=0.05)
        assert sample.abs().max() < 2


@pytest.mark.parametrize("num_inference_steps", [1, 7, 61, 103, 257, 997])
def test_trailing_steps_are_as_many_as_asked_for(num_inference_steps):
    scheduler = CosineVariantScheduler()
    scheduler.set_timesteps(num_inference_steps)
    assert scheduler.timesteps.shape == (num_inference_steps,)
    assert scheduler.timesteps[0] == 999 and scheduler.timesteps.min() >= 0


def test_custom_timesteps():
    scheduler = CosineVariantScheduler()
    scheduler.set_timesteps(timesteps=[999, 500, 10])
    assert scheduler.timesteps.tolist() == [999, 500, 10]


class TestWithoutAClamp:
    """One argument is enough for latents without bounds."""

    @pytest.mark.parametrize("scheduler_class", [CosineVariantScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
    def test_also_after_a_swap(self, scheduler_class):
        config = CosineVariantScheduler(clip_sample=False).config
        scheduler = scheduler_class.from_config(config)
        scheduler.set_timesteps(4)
        sample, epsilon = torch.full((1, 1, 2, 2), 3.0), torch.zeros(1, 1, 2, 2)  # the clean sample is far outside
        stepped = scheduler.step(epsilon, scheduler.timesteps[-1], sample).prev_sample
        assert stepped.abs().max() > 2.5
        clamped = scheduler_class.from_config(CosineVariantScheduler().config)
        clamped.set_timesteps(4)
        assert clamped.step(epsilon, clamped.timesteps[-1], sample).prev_sample.abs().max() < 2.5

    def test_config(self):
        assert CosineVariantScheduler().config.thresholding
        assert not CosineVariantScheduler(clip_sample=False).config.thresholding
        assert CosineVariantScheduler(clip_sample=False, thresholding=True).config.thresholding
        saved = CosineVariantScheduler().config
        assert not CosineVariantScheduler.from_config(saved, clip_sample=False).config.thresholding

    @pytest.mark.parametrize("scheduler_class", [CosineVariantScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
    def test_other_bounds(self, scheduler_class):
        """Where a scheduler knows bounds other than 1 it keeps to them, and none keeps to 1."""
        scheduler = scheduler_class.from_config(CosineVariantScheduler(clip_sample_range=2.0).config)
        assert not scheduler.config.thresholding
        saved = CosineVariantScheduler().config
        assert not CosineVariantScheduler.from_config(saved, clip_sample_range=2.0).config.thresholding
        scheduler.set_timesteps(4)
        sample, epsilon = torch.full((1, 1, 2, 2), 9.0), torch.zeros(1, 1, 2, 2)
        stepped = scheduler.step(epsilon, scheduler.timesteps[-1], sample).prev_sample
        assert (stepped.abs().max() < 4) == (scheduler_class is not DPMSolverMultistepScheduler)
        assert stepped.abs().max() > 1.5

    @pytest.mark.parametrize(("options", "warned"), [({}, True), ({"clip_sample": False}, False)])
    def test_latents_that_leave_the_range_are_named_once(self, options, warned, warnings):
        scheduler = CosineVariantScheduler(**options)
        for _ in range(2):
            scheduler.add_noise(torch.full((1, 1, 1, 1), 2.5), torch.zeros(1, 1, 1, 1), torch.tensor([0]))
        assert len(warnings) == warned
        assert all("reach 2.5 in size, but sampling will clamp them to [-1, 1]" in text for text in warnings)

    def test_key_codes_are_in_range(self, warnings):
        CosineVariantScheduler().add_noise(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([0]))
        assert not warnings


def test_thresholding_is_the_parent_class_one():
    scheduler = CosineVariantScheduler()
    sample = 3 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        scheduler._threshold_sample(sample), diffusers.DDPMScheduler._threshold_sample(scheduler, sample)
    )
    wide = CosineVariantScheduler(sample_max_value=2.0)
    torch.testing.assert_close(wide._threshold_sample(sample), diffusers.DDPMScheduler._threshold_sample(wide, sample))


@pytest.mark.parametrize(
    "prediction_type, formula",
    [
        ("epsilon", lambda snr: np.minimum(snr, 5) / snr),
        ("v_prediction", lambda snr: np.minimum(snr, 5) / (snr + 1)),
        ("sample", lambda snr: np.minimum(snr, 5)),
    ],
)
def test_min_snr_weights(prediction_type, formula):
    scheduler = CosineVariantScheduler(prediction_type=prediction_type)
    timesteps = torch.tensor([0, 100, 300, 700, 999])
    weights = min_snr_weights(scheduler, timesteps)
    alpha_bar = scheduler.alphas_cumprod.double().numpy()[timesteps]
    assert weights.dtype == torch.float32 and weights.shape == (5,)
    np.testing.assert_allclose(weights, formula(alpha_bar / (1 - alpha_bar)), rtol=1e-4)


def test_min_snr_weights_are_finite_at_zero_snr():
    scheduler = CosineVariantScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert min_snr_weights(scheduler, torch.tensor([999])).item() == 0


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"gamma_schedule": "sigmoid"}, "gamma_schedule is 'sigmoid'; choose one of cosine_variant, cosine, linear"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow'; choose one of epsilon"),
        ({"start": 0.5, "end": 0.5}, "start is 0.5 and end is 0.5"),
        ({"start": -0.1}, "start is -0.1"),
        ({"end": 1.1}, "end is 1.1"),
        ({"tau": 0}, "tau is 0; it must be a positive number"),
        ({"tau": float("nan")}, "tau is nan"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0; it must be from 1 to 100000"),
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas has shape \(2,\); num_train_timesteps=1000"),
        ({"trained_betas": [1.5], "num_train_timesteps": 1}, r"trained_betas has values outside \[0, 1\]"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True needs prediction_type"),
    ],
)
def test_construction_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CosineVariantScheduler(**kwargs)


def test_other_errors():
    with pytest.raises(ValueError, match="t has values outside"):
        schedule_gamma(np.array([0.5, 1.5]), "linear")
    with pytest.raises(ValueError, match="gamma is 0"):
        min_snr_weights(CosineVariantScheduler(), torch.tensor([0]), gamma=0)
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        CosineVariantScheduler().set_timesteps(0)
