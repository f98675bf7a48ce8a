"""Skills without a language model: clusters of prompts, each named by the terms that tell it from the others.

Dimensions in names: N prompt, V skill, D width of the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SHOTS = 5  # prompts a skill is made of, on average
_TERMS = 2  # of a name
_TOKEN = r"(?u)\b[^\W\d_]{2,}\b"


def clusters(x_ND: Tensor) -> tuple[list[int], Tensor]:
    """(each prompt's cluster, centres [V, D] of length 1). k-means on embeddings of length 1; the same every time."""
    from sklearn.cluster import KMeans

    distinct = len(torch.unique(x_ND, dim=0))
    count = max(1, min(round(len(x_ND) / SHOTS), distinct))
    labels = KMeans(count, n_init=4, random_state=0).fit_predict(x_ND.double().numpy())
    member_VN = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), count).T.to(x_ND)
    return [int(label) for label in labels], torch.nn.functional.normalize(member_VN @ x_ND, dim=-1)


def names(texts: Sequence[str], labels: Sequence[int]) -> list[str]:
    """A name for each cluster: its terms of the highest TF-IDF, where a document is a cluster. No two are the same."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    count = max(labels) + 1
    documents = [" ".join(text for text, label in zip(texts, labels, strict=True) if label == v) for v in range(count)]
    try:
        reader = TfidfVectorizer(token_pattern=_TOKEN, stop_words="english", sublinear_tf=True)
        weights_VW = reader.fit_transform(documents).toarray()
    except ValueError:  # no words at all
        return [f"skill {v + 1}" for v in range(count)]
    terms = reader.get_feature_names_out()
    found: list[str] = []
    for v, weights_W in enumerate(weights_VW):
        best = [terms[w] for w in sorted(range(len(terms)), key=lambda w: (-weights_W[w], terms[w])) if weights_W[w] > 0]
        name = next((n for k in range(_TERMS, len(best) + 1) if (n := " ".join(best[:k])) not in found), None)
        found.append(name or " ".join([*best, f"#{v + 1}"]))
    return found
