"""Iterative FGSM with momentum, with input transformations and variance tuning for transferability."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backpass.attacks.companions import Pool, patches_out, smooth
from backpass.attacks.diversity import Diversity
from backpass.attacks.iterative import Ascent, Iterative
from backpass.attacks.jobs import Jobs
from backpass.attacks.noise import make_key, uniform
from backpass.attacks.oracle import Oracle, Pass
from backpass.attacks.settings import count, setting
from backpass.attacks.state import State
from backpass.attacks.threat import per_sample
from backpass.errors import BackpassError

__all__ = ["MIFGSM"]

_NEIGHBOUR = 6  # purpose of random draws


@dataclass(frozen=True, eq=False, kw_only=True)
class Tuned(Ascent):
    """State of an ascent with momentum; variance: (B, ...), the variance that is added to the next gradient."""

    variance: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class MIFGSM(Iterative):
    """Iterative FGSM with momentum, m <- decay * m + g / |g|_1, z <- project(z + step * direction(m)).

    All options beyond momentum are off by default and can be combined. A step takes ``scales`` gradients,
    ``scales * mixed`` with admix, and with variance tuning ``variance + 1`` times as many.

    Args:
        decay: decay factor of the momentum, at least 0.
        diversity: probability that the gradient is taken at a randomly shrunk and padded image (DIM: Xie et al.,
            Improving transferability of adversarial examples with input diversity, 2019, section 3.3).
        resize: smallest side of the shrunk image, as a fraction in (0, 1].
        translation: largest shift k in pixels; the gradient is convolved with a Gaussian window of 2 k + 1 pixels and
            standard deviation k / sqrt(3) (TI: Dong et al., Evading defenses to transferable adversarial examples by
            translation-invariant attacks, 2019, section 3.3; k = 7 there).
        scales: number m of copies z / 2^i, i < m, over which the loss is averaged (SI: Lin et al., Nesterov accelerated
            gradient and scale invariance for adversarial attacks, 2020, section 3.3; 5 there).
        nesterov: take the gradient at z + step * decay * m, with m in units of its mean absolute gradient; for the norm
            linf (NI: Lin et al., 2020, section 3.2).
        mix: strength eta of other images of the ``pool`` that are added before scaling, (z + eta x') / 2^i (admix:
            Wang, He, Wang, He, Admix: enhancing the transferability of adversarial attacks, 2021, section 3.2; 0.2
            there, with ``scales=5``).
        mixed: number of images x' of other classes that are mixed in, one at a time, with ``mix``.
        pool: the images to mix in.
        variance: number N of neighbours z + r, r ~ U[-beta eps, beta eps], whose mean gradient less the gradient at z
            is added to the next step's gradient; for the norm linf (VMI: Wang, He, Enhancing the transferability of
            adversarial attacks through variance tuning, 2021, algorithm 1; 20 there).
        beta: radius of the neighbourhood of ``variance``, in units of eps.
        patchout: share of the patches whose perturbation the model does not see at a step (PatchOut: Wei et al.,
            Towards transferable adversarial attacks on vision transformers, 2022, section 3.4, without its l_2 term; 66
            of 196 patches there, with the rule PNA).
        patch: side of a patch in pixels.

    Source: Dong et al., Boosting adversarial attacks with momentum (2018), algorithm 1.
    """

    decay: float = setting(1.0, "[0, inf)")
    diversity: float = setting(0.0, "[0, 1]")
    resize: float = setting(0.9, "(0, 1]")
    translation: int = count(0, least=0)
    scales: int = count(1)
    nesterov: bool = False
    mix: float = setting(0.0, "[0, inf)")
    mixed: int = count(3)
    pool: Pool | None = None
    variance: int = count(0, least=0)
    beta: float = setting(1.5, "[0, inf)")
    patchout: float = setting(0.0, "[0, 1)")
    patch: int = count(16)

    def __post_init__(self) -> None:
        """Validate the settings."""
        super().__post_init__()
        if self.pool is not None and not isinstance(self.pool, Pool):
            raise BackpassError(f"pool must be a Pool of images and labels; got {type(self.pool).__name__}.")
        if (self.nesterov or self.variance) and self.norm != "linf":
            raise BackpassError(f"nesterov and variance are defined for the norm linf; got norm={self.norm!r}.")

    @property
    def _random(self) -> bool:
        return super()._random or any((self.diversity, self.mix, self.variance, self.patchout))

    @property
    def _copies(self) -> int:
        """Number of copies of an image over which a gradient is averaged."""
        return self.scales * (self.mixed if self.mix else 1)

    def cost(self, steps: int) -> int:
        """Return the number of gradients in ``steps`` steps of one search."""
        return super().cost(steps) * self._copies + self.eot * self._copies * self.variance * max(steps - 1, 0)

    def begin(self, oracle: Oracle, jobs: Jobs) -> Ascent:
        """Return the initial state.

        Raises:
            BackpassError: a setting requires images (N, C, H, W) and x has another shape, or admix has no pool.
        """
        if (self.translation or self.patchout) and jobs.x.dim() != 4:
            raise BackpassError(
                f"translation and patchout work on images (N, C, H, W); got samples of shape {tuple(jobs.x.shape)}."
            )
        if self.mix and self.pool is None:
            raise BackpassError("admix mixes other images in: give pool=Pool(images, labels) beside mix.")
        start = super().begin(oracle, jobs)
        return Tuned(jobs=jobs, z=start.z, seen=start.seen)

    def view(self, jobs: Jobs, iteration: int) -> Callable[[Tensor], Tensor] | None:
        """Return the input transformation of view number ``iteration``: PatchOut, noise, admix, scale, diversity."""
        views = []
        look, copy = divmod(iteration, self._copies)
        if self.patchout:
            step = look // (self.variance + 1)
            views.append(patches_out(self.patchout, self.patch, self.seed, jobs, step))
        noisy = super().view(jobs, iteration)
        if noisy is not None:
            views.append(noisy)
        if self.mix:
            assert self.pool is not None  # noqa: S101 -- `begin` has seen to it
            # The same image for all scales, as in the paper.
            other = self.pool.draw(self.seed, jobs, look * self.mixed + copy // self.scales)
            views.append(lambda z: z + self.mix * other)
        if copy % self.scales:
            views.append(lambda z: z / 2 ** (copy % self.scales))
        if self.diversity:
            views.append(Diversity(self.diversity, self.resize).draw(self.seed, jobs, iteration))
        return _composed(views) if views else None

    def look(self, oracle: Oracle, state: Ascent, iteration: int) -> tuple[Pass, bool]:
        """Return logits, loss and gradient, averaged over the copies, and True if they are of `state.z` itself."""
        z, number = self._point(state), iteration * (self.variance + 1)
        exact = z is state.z and self._copies == 1 and self.view(state.jobs, number) is None
        return self._average(oracle, z, state.jobs, number), exact

    def _point(self, state: Ascent) -> Tensor:
        """Return the images (B, ...) at which the gradient is taken."""
        if not self.nesterov or state.memory is None:
            return state.z
        return state.z + self.step * self.decay * state.memory[0].numel() * state.memory

    def _average(self, oracle: Oracle, z: Tensor, jobs: Jobs, number: int) -> Pass:
        """Return logits, loss and gradient, averaged over the copies of these images."""
        copies = range(number * self._copies, (number + 1) * self._copies)
        found = [oracle.gradient(z, jobs, view=self.view(jobs, copy)) for copy in copies]
        return (
            found[0] if len(found) == 1 else Pass(*(torch.stack(parts).mean(0) for parts in zip(*found, strict=True)))
        )

    def advance(self, oracle: Oracle, state: State, iteration: int) -> Ascent:
        """Take one projected step; variance tuning adds the variance of the previous step to the gradient."""
        if not self.variance:
            return super().advance(oracle, state, iteration)
        assert isinstance(state, Tuned)  # noqa: S101 -- `begin` made it
        (logits, _, gradient), exact = self.look(oracle, state, iteration)
        variance = None
        if iteration + 1 < self.steps:
            variance = self._mean_nearby(oracle, state, iteration).sub_(gradient)
        tuned = gradient if state.variance is None else gradient + state.variance
        after = self.stepped(oracle, state, tuned)
        return replace(
            state, z=after.z, seen=state.z, memory=after.memory, logits=logits, exact=exact, variance=variance
        )

    def _mean_nearby(self, oracle: Oracle, state: Ascent, iteration: int) -> Tensor:
        """Return the mean gradient (B, ...) of random neighbours."""
        jobs, z, total = state.jobs, self._point(state), torch.zeros_like(state.z)
        for neighbour in range(self.variance):
            number = iteration * self.variance + neighbour
            key = make_key(self.seed, jobs.index, jobs.restart, _NEIGHBOUR, number, like=jobs.index)
            away = (2.0 * uniform(key, z) - 1.0) * self.beta * jobs.threat.radius(jobs.x)
            look = iteration * (self.variance + 1) + neighbour + 1
            total += self._average(oracle, z + away, jobs, look).gradient
        return total.div_(self.variance)

    def direction(self, oracle: Oracle, gradient: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the steepest-ascent direction of the updated momentum, and the momentum."""
        if self.translation:
            gradient = smooth(gradient, self.translation)
        length = gradient.abs().flatten(1).sum(1).clamp_min(torch.finfo(gradient.dtype).tiny)
        momentum = gradient / per_sample(length, gradient)
        if memory is not None:
            momentum = momentum.add_(memory, alpha=self.decay)
        return oracle.threat.direction(momentum), momentum


def _composed(views: list[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    def view(z: Tensor) -> Tensor:
        for one in views:
            z = one(z)
        return z

    return view
