"""What an attacker gets to see of a round's updates, under each protection."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedseg.privacy.clipping import clip_factor
from fedseg.privacy.fixed_point import Encoding, decode_values, encode_values
from fedseg.privacy.noise import add_noise
from fedseg.privacy.secagg_masks import Words, add_mask

__all__ = ["SETTINGS", "Setting", "Terms", "clipped", "masked_words", "noised_sum"]

Floats = npt.NDArray[np.float32]

_KEY_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How strong the protections are.

    Attributes:
        clip: L2 norm C that an update is clipped to.
        noise_multiplier: z of the noise N(0, (zC)^2).
        word_clip: With secure aggregation a single value is clipped to it.
    """

    clip: float
    noise_multiplier: float
    word_clip: float


View = Callable[[Floats, int, Terms, np.random.Generator], Floats]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One protection, and who attacks it with what.

    Attributes:
        sees: What the attacker sees, for people.
        view: `(updates [k, N], site, terms, rng) -> [N]`: what is seen of a site's update, or of
            the mean of all.
        of_all: Whether that is the mean of all k sites.
        model: Setting whose global model this one has: its own where empty.
    """

    sees: str
    view: View
    of_all: bool = False
    model: str = ""

    def mean(self, updates: Floats, terms: Terms, rng: np.random.Generator) -> Floats:
        """Change of the global model: equal weights, as central differential privacy forces."""
        if self.of_all:
            return self.view(updates, 0, terms, rng)
        seen = [self.view(updates, site, terms, rng) for site in range(len(updates))]
        mean: Floats = np.mean(seen, axis=0, dtype=np.float32)
        return mean


def clipped(update: Floats, clip: float) -> Floats:
    """Scale an update `[N]` of larger L2 norm down to `clip`."""
    norm = float(np.linalg.norm(update.astype(np.float64)))
    return update * np.float32(clip_factor(norm, clip))


def noised_sum(
    updates: Floats, clip: float, noise_multiplier: float, rng: np.random.Generator
) -> Floats:
    """Sum of clipped updates `[k, N]` plus N(0, (zC)^2) on each value, float32 `[N]`.

    The noise of a real run has a key that nobody knows; here the seed gives it, so that a test can
    be repeated.
    """
    total = np.zeros(updates.shape[1], np.float32)
    for update in updates:
        total += clipped(update, clip)
    add_noise(total, noise_multiplier * clip, key=rng.bytes(_KEY_BYTES))
    return total


def masked_words(update: Floats, encoding: Encoding, rng: np.random.Generator) -> Words:
    """Fixed point words `[N]` of an update under one mask, as the server gets them from a site."""
    words = _words(update, encoding, rng)
    add_mask(words, rng.bytes(_KEY_BYTES))
    return words


def _words(update: Floats, encoding: Encoding, rng: np.random.Generator) -> Words:
    words = np.empty(len(update), np.uint32)
    encode_values(update, 1.0, encoding, rng=rng, out=words)
    return words


def _encoding(updates: Floats, terms: Terms) -> Encoding:
    return Encoding(sites=len(updates), clip=terms.word_clip, max_weight=1.0)


def _plain(updates: Floats, site: int, terms: Terms, rng: np.random.Generator) -> Floats:
    one: Floats = updates[site]
    return one


def _clipped(updates: Floats, site: int, terms: Terms, rng: np.random.Generator) -> Floats:
    return clipped(updates[site], terms.clip)


def _local_dp(updates: Floats, site: int, terms: Terms, rng: np.random.Generator) -> Floats:
    return noised_sum(updates[site : site + 1], terms.clip, terms.noise_multiplier, rng)


def _central_dp(updates: Floats, site: int, terms: Terms, rng: np.random.Generator) -> Floats:
    total = noised_sum(updates, terms.clip, terms.noise_multiplier, rng)
    total /= np.float32(len(updates))
    return total


def _one_masked(updates: Floats, site: int, terms: Terms, rng: np.random.Generator) -> Floats:
    # The best that can be read from words whose mask is unknown: what they would say without one.
    encoding = _encoding(updates, terms)
    signed = masked_words(updates[site], encoding, rng).view(np.int32)
    read: Floats = (signed * (encoding.clip / encoding.scale)).astype(np.float32)
    return read


def _secure_mean(updates: Floats, site: int, terms: Terms, rng: np.random.Generator) -> Floats:
    # Masks cancel exactly: the sum of the words without them is what the server unmasks.
    encoding = _encoding(updates, terms)
    total = np.zeros(updates.shape[1], np.uint32)
    for update in updates:
        total += _words(update, encoding, rng)
    mean: Floats = decode_values(total, float(len(updates)), encoding)
    return mean


SETTINGS: Mapping[str, Setting] = {
    "none": Setting(sees="server: the site's update", view=_plain),
    "clipping": Setting(sees="server: the site's update, clipped", view=_clipped),
    "local-dp": Setting(sees="server: the site's update, clipped, with noise", view=_local_dp),
    "central-dp": Setting(
        sees="who gets the model: sum of clipped updates, with noise", view=_central_dp, of_all=True
    ),
    # The sum is that of plain averaging but for fixed point's rounding, and so is the model.
    "secagg, one site": Setting(
        sees="server: the site's masked words", view=_one_masked, model="none"
    ),
    "secagg, sum": Setting(
        sees="server: sum of the updates", view=_secure_mean, of_all=True, model="none"
    ),
}
"""Name to setting, in the order they are shown."""
