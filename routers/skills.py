"""Skills (Symbolic-MoE): which skills does the prompt ask for, and who has shown them? A few adapters are recruited for each prompt.

Profile. Every shot asks for some skills; a candidate (the base or an adapter) gets +1 for each of them where it answers the shot
rightly and −1 where not: P [V, 1 + E], whole numbers. Right is an exact match where somebody's answer was one; of a shot that nobody
answered exactly, or where no answers were generated, a mean NLL within 0.1 nats a token of the best candidate's.

Skills. With `llm`, keywords that two of five answers of that model at temperature 0.7 agree on, known by their own embedding. Without,
clusters of the shots' embeddings, of five shots on average, known by their centre and named by their terms of highest TF-IDF.

Prompt. Its keywords (without `llm` the prompt, or that tail of it that is nearest to a skill) are mapped to the nearest skill by
cosine. Local score L_c = Σ_v P[v, c] over the skills that were found, twice if found twice; global strength G_c = Σ_v P[v, c], all
raised by 1 − min G where that is not positive, then squared and normalised. `recruits` draws with replacement, ∝ L_c·G_c over the
candidates with L_c > 0; where there are none, ∝ (L_c − min L + 1)·G_c over all. How often an adapter was drawn, divided by
`recruits`, is its weight at every site and token; the base's draws are left out of the sum.

From Chen et al. 2025, Symbolic-MoE (arXiv:2503.05641, released code). Departures: candidates are adapters of one base, mixed in one
forward (`recycler.recruiting` has them answer one by one and aggregates, as the paper does); the base is a candidate; a keyword
whose best cosine is below `floor` is dropped, and without any keyword G alone decides (released: the nearest whatever it is, and
uniform); a strength of zero is raised too (released: only negative ones, so that a candidate at zero is never drawn); each prompt
has random numbers of its own, from its hash (released: one stream, so that answers depend on the order of questions).

Shapes: P [V + 1, 1 + E] (its last row: shots without keywords), skills [V, D], weights [B, E].
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from recycler.routers import instructions, skill_words
from recycler.routers.protocol import Model, Profile, Reader
from recycler.routers.requests import MINILM, tails
from recycler.routers.sequence import Decision, SequenceRouter
from recycler.zoo.errors import InputError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

BASE = "base"
_NEAR = 0.1  # nats a token
_SHOWN = 5  # candidates in an explanation


@dataclass(frozen=True)
class SkillsConfig:
    """
    Attributes:
        llm: names the skills of shots and prompts: a model's folder, its id on the Hub, or ``https://host/v1#model``; none does
            without.
        recruits: how many are drawn for a prompt, with replacement.
        floor: a keyword whose best cosine with a skill is below this matches none.
        encoder: a sentence encoder: an id of the Hub, or a folder.
        aggregator: how `recycler.recruiting` makes one answer of several; auto finds the best on the shots.
        seed: draws others.
    """

    llm: str | None = None
    recruits: int = 3
    floor: float = 0.3
    encoder: str = MINILM
    aggregator: Literal["auto", "strongest", "majority", "own", "base", "synthesis"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.recruits < 1:
            raise UsageError(f"recruits={self.recruits}.", "Somebody has to answer.", "Use 1 or more.", code="E_OPTION")
        if not -1 <= self.floor <= 1:
            raise UsageError(f"floor={self.floor}.", "It is a cosine.", "Use a number from -1 to 1.", code="E_OPTION")


@dataclass
class Recruitment:
    """Who answers one prompt, and why.

    Attributes:
        matches: (keyword, skill, cosine) of each keyword that matched.
        keywords: all of them.
        local: candidate → L; empty where no keyword matched.
        strength, probability: candidate → share. drawn: candidate → how often.
    """

    keywords: list[str]
    matches: list[tuple[str, str, float]]
    local: dict[str, int]
    strength: dict[str, float]
    probability: dict[str, float]
    drawn: Counter[str] = field(default_factory=Counter)

    @property
    def order(self) -> list[str]:
        """The recruits, likeliest first."""
        return sorted(self.drawn, key=lambda name: (-self.probability[name], name))

    def to_json(self) -> dict[str, Any]:
        shown = {*sorted(self.probability, key=lambda name: (-self.probability[name], name))[:_SHOWN], *self.drawn}
        return {
            "keywords": self.keywords,
            "skills": [{"keyword": word, "skill": skill, "similarity": round(s, 3)} for word, skill, s in self.matches],
            "local": {name: value for name, value in sorted(self.local.items()) if name in shown},
            "global": {name: round(value, 4) for name, value in sorted(self.strength.items()) if name in shown},
            "probability": {name: round(value, 4) for name, value in sorted(self.probability.items()) if name in shown},
            "recruits": {name: self.drawn[name] for name in self.order},
        }


@dataclass
class Lesson:
    """What one shot added to the profile, so that it can be left out: `rows` of P, and `signs_C` for each."""

    shot: Any
    text: str
    rows: list[int]
    signs_C: Tensor


class Skills(SequenceRouter):
    """weights = draws / recruits, drawn ∝ L·G"""

    Config = SkillsConfig
    needs = frozenset({"shots", "scores", "embeddings", "skills"})
    paper = "Symbolic-MoE (arXiv:2503.05641), one mixture instead of several answers"
    abstains = True

    def __init__(self, adapters: Sequence[str], config: Any) -> None:
        super().__init__(adapters, config)
        self.skills_VD = torch.zeros(0, 1)
        self.profile_VC = torch.zeros(1, 1 + len(self.adapters), dtype=torch.int32)
        self.lessons: list[Lesson] = []  # of this fit; not kept on disk
        self._index: Any = None

    # -- learning

    @classmethod
    def fit(cls, model: Model, profile: Profile, config: SkillsConfig) -> Self:
        router = cls(model.adapters, config)
        shots, signs_NC = _lessons(profile, model.adapters)
        texts = [text for shot in shots for text in model.texts(model.prompts([[shot]]))]
        if config.llm is None:
            embedded_ND = model.embed(texts, config.encoder)
            labels, router.skills_VD = skill_words.clusters(embedded_ND)
            names, rows = skill_words.names(texts, labels), [[label] for label in labels]
        else:
            found = instructions.keywords(model, texts, config.llm)
            names = sorted({word for some in found for word in some})
            router.skills_VD = model.embed(names, config.encoder) if names else torch.zeros(0, 1)
            rows = [[names.index(word) for word in some] for some in found]
        router.profile_VC = torch.zeros(len(names) + 1, 1 + len(model.adapters), dtype=torch.int32)
        for shot, text, some, signs_C in zip(shots, texts, rows, signs_NC, strict=True):
            lesson = Lesson(shot, text, some or [len(names)], signs_C)
            router.lessons.append(lesson)
            for row in lesson.rows:
                router.profile_VC[row] += signs_C
        router.report = {"skills": names, **router._strengths()}
        return router

    def _strengths(self) -> dict[str, Any]:
        shares = strengths(dict(zip(self.candidates, self.profile_VC.sum(0).tolist(), strict=True)))
        total = sum(shares.values())
        return {"strength": {name: round(value / total, 4) for name, value in shares.items()}}

    def extended(self, model: Model, profile: Profile, name: str) -> Self:
        """The new adapter's column, from all shots of its profile on the skills that are known. Who of the others is in that profile
        decides with it what is right, and keeps the column it had."""
        shots, signs_NC = _lessons(profile, [name])
        texts = [text for shot in shots for text in model.texts(model.prompts([[shot]]))]
        column_V = torch.zeros(len(self.profile_VC), 1, dtype=torch.int32)
        for found, signs_C in zip(self._read(model, texts), signs_NC, strict=True):
            for row in [row for row, *_ in found[1]] or [len(column_V) - 1]:
                column_V[row] += signs_C[1:]
        return self._changed((*self.adapters, name), torch.cat([self.profile_VC, column_V], dim=1))

    def without(self, name: str) -> Self:
        if name not in self.adapters or len(self.adapters) == 1:
            raise UsageError(
                f"The router cannot let go of {name}.",
                f"It holds {', '.join(self.adapters)}.",
                "Name one of several.",
                code="E_FIXED",
            )
        kept = [0, *(1 + e for e, other in enumerate(self.adapters) if other != name)]
        return self._changed(tuple(other for other in self.adapters if other != name), self.profile_VC[:, kept])

    def _changed(self, adapters: Sequence[str], profile_VC: Tensor) -> Self:
        made = type(self)(adapters, self.config)
        made.skills_VD, made.profile_VC = self.skills_VD, profile_VC
        made.report = {**self.report, **made._strengths()}
        return made

    # -- deciding

    @property
    def candidates(self) -> tuple[str, ...]:
        """The base, then the adapters: the columns of P."""
        return (BASE, *self.adapters)

    @property
    def skills(self) -> Sequence[str]:
        """Their names: the rows of P but the last."""
        names: Sequence[str] = self.report.get("skills", ())
        return names

    @property
    def aggregator(self) -> str:
        """How several answers become one: as the config says, or as was found on the shots."""
        chosen = self.config.aggregator
        return str(self.report.get("aggregator", {}).get("chosen", "majority") if chosen == "auto" else chosen)

    def decide(self, reader: Reader, inputs: Mapping[str, Any]) -> Decision:
        recruited = self.recruit(reader, reader.texts(inputs))
        drawn_BE = torch.tensor([[float(one.drawn[name]) for name in self.adapters] for one in recruited])
        return Decision(drawn_BE / self.config.recruits, [one.to_json() for one in recruited])

    def recruit(
        self, reader: Reader, texts: Sequence[str], lessons: Sequence[Lesson | None] | None = None
    ) -> list[Recruitment]:
        """Who answers each prompt.

        Args:
            lessons: for each prompt, what the profile shall not know of it; its skills are the lesson's.
        """
        result = []
        left_out = [None] * len(texts) if lessons is None else lessons
        for text, (words, found), lesson in zip(texts, self._read(reader, texts), left_out, strict=True):
            profile_VC = self.profile_VC
            if lesson is not None:
                profile_VC = profile_VC.clone()
                for row in lesson.rows:
                    profile_VC[row] -= lesson.signs_C
            strength = strengths(self._named(profile_VC.sum(0)))
            local = self._named(profile_VC[[row for row, *_ in found]].sum(0)) if found else {}
            shares = scores(local, strength)
            total, all_strength = sum(shares.values()), sum(strength.values())
            one = Recruitment(
                words,
                [(word, self.skills[row], similarity) for row, word, similarity in found],
                local,
                {name: value / all_strength for name, value in strength.items()},
                {name: value / total for name, value in shares.items()},
            )
            one.drawn = draw(shares, self.config.recruits, f"{self.config.seed} {text}")
            result.append(one)
        return result

    def _named(self, values_C: Tensor) -> dict[str, int]:
        return dict(zip(self.candidates, values_C.tolist(), strict=True))

    def _read(self, reader: Reader, texts: Sequence[str]) -> list[tuple[list[str], list[tuple[int, str, float]]]]:
        """Of each text, its keywords, and (skill, keyword, cosine) of those that match."""
        whole = self.config.llm is None
        if whole:
            words = [tails(text) for text in texts]
        else:
            words = instructions.keywords(reader, texts, self.config.llm)
        flat = [word for some in words for word in some]
        nearest = iter(self._nearest(reader, flat))
        result = []
        for some in words:
            matches = [(row, word, similarity) for word, (row, similarity) in zip(some, nearest, strict=False)]
            if whole:  # the tail that is nearest to a skill is what is asked
                matches = [max(matches, key=lambda match: match[2])]
                some = [_short(matches[0][1])]
                matches = [(row, some[0], similarity) for row, _, similarity in matches]
            result.append((some, [match for match in matches if match[2] >= self.config.floor]))
        return result

    def _nearest(self, reader: Reader, words: Sequence[str]) -> list[tuple[int, float]]:
        """(skill, cosine) of each word; without skills nothing is near."""
        if not len(self.skills_VD) or not words:
            return [(0, -2.0)] * len(words)
        if self._index is None:
            import faiss

            self._index = faiss.IndexFlatIP(self.skills_VD.shape[1])
            self._index.add(self.skills_VD.float().contiguous().numpy())
        similarity_NK, row_NK = self._index.search(reader.embed(words, self.config.encoder).contiguous().numpy(), 1)
        return [(int(row), float(s)) for row, s in zip(row_NK[:, 0], similarity_NK[:, 0], strict=True)]

    # -- on disk

    def tensors(self) -> dict[str, Tensor]:
        return {"skills": self.skills_VD, "profile": self.profile_VC}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.skills_VD, self.profile_VC = tensors["skills"], tensors["profile"]
        if self.profile_VC.shape != (len(self.skills_VD) + 1, len(self.candidates)) or len(self.skills) != len(self.skills_VD):
            raise InputError(
                "The profile has not a row per skill and a column per candidate.",
                "",
                "Build the router again.",
                code="E_ROUTER",
            )


# ------------------------------------------------------------------------------------------------------------- whole numbers


def right(profile: Profile) -> Tensor:
    """Whether each candidate answers each shot rightly, [1 + E, tasks, K]."""
    near = profile.nll <= profile.nll.amin(0) + _NEAR
    if profile.exact is None:
        return near
    exact = profile.exact > 0.5
    return torch.where(exact.any(0), exact, near)


def strengths(total: Mapping[str, int]) -> dict[str, int]:
    """G of each candidate, not normalised: its sum over all skills, all raised until the least is 1 where it is less, squared.
    (The paper's exponent 1/T at T = 0.5.)"""
    least = min(total.values())
    raised = 1 - least if least <= 0 else 0
    return {name: (value + raised) ** 2 for name, value in total.items()}


def scores(local: Mapping[str, int], strength: Mapping[str, int]) -> dict[str, int]:
    """L·G of each candidate, not normalised; G alone where there is no L.

    Where no L is positive, (L − min L + 1)·G over all; else candidates whose L is not positive get 0.
    """
    if not local:
        return dict(strength)
    if max(local.values()) > 0:
        return {name: max(value, 0) * strength[name] for name, value in local.items()}
    least = min(local.values())
    return {name: (value - least + 1) * strength[name] for name, value in local.items()}


def draw(shares: Mapping[str, int], count: int, key: str) -> Counter[str]:
    """`count` draws with replacement ∝ shares. They depend on `key`, and neither on other draws nor on the order of candidates."""
    names = sorted(shares)
    rng = random.Random(int.from_bytes(sha256(key.encode()).digest(), "big"))
    return Counter(rng.choices(names, [shares[name] for name in names], k=count))


def _lessons(profile: Profile, names: Sequence[str]) -> tuple[list[Any], Tensor]:
    """(shots, ±1 of the base and of the named adapters [N, C]), tasks in the order of their names."""
    columns = [0, *(1 + profile.adapters.index(name) for name in names)]
    sign_CTK = right(profile)[columns].int() * 2 - 1
    order = sorted(range(len(profile.shots)), key=lambda t: list(profile.shots)[t])
    tasks = list(profile.shots)
    rows = [(shot, sign_CTK[:, t, k]) for t in order for k, shot in enumerate(profile.shots[tasks[t]])]
    return [shot for shot, _ in rows], torch.stack([signs_C for _, signs_C in rows])


def _short(text: str, limit: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
