"""Which words made a judgement: integrated gradients through the frozen backbone, words left out, and exact places.

Shapes: `T` tokens of prompt and reply, `R` of them of the reply, `D` size of a token's vector, `O` outputs.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from hominem_mlx.errors import InputError
from hominem_mlx.metrics import spearman
from hominem_mlx.models.encoder import Passage
from hominem_mlx.models.platform import lanes
from hominem_mlx.reward.attention import AttentionHead
from hominem_mlx.reward.features import Backbone, Progress
from hominem_mlx.reward.model import RewardModel
from hominem_mlx.schema import EMPTY

STEPS, MOST = 32, 256  # points on the way from the baseline to the reply: at first, and at most
RELATIVE, ABSOLUTE = 0.05, 1e-3  # how far attributions may be from adding up to the whole difference
POINTS = 8  # a pass
SENTENCE = re.compile(r"(?<=[.!?…。！？])\s+|\n+")


@dataclass(frozen=True)
class Attribution:
    """What each piece of a reply adds to one output.

    `values` `[R]` add up to `value - baseline` where `is_complete`; both are unclipped, in the output's own unit.
    `baseline` is the output where each token of the reply is replaced by the mean of all, and no word of it counted.
    The pooling `near` still looks at the token of the prompt that it looks at in the reply itself: the way from one to
    the other would have jumps otherwise, and those no gradient. Joined, `pieces` are what was read.
    """

    output: str
    pieces: tuple[str, ...]
    values: tuple[float, ...]
    value: float
    baseline: float
    steps: int
    is_complete: bool

    @property
    def words(self) -> list[tuple[str, float]]:
        """Whole words with the space before them, and what their pieces add together."""
        return words_of(self.pieces, self.values)


def words_of(pieces: Sequence[str], values: Sequence[float]) -> list[tuple[str, float]]:
    """Pieces of a reply put together to whole words, each with the space before it, and the sums of their values."""
    found: list[tuple[str, float]] = []
    for piece, value in zip(pieces, values, strict=True):
        if found and not (piece[:1].isspace() or found[-1][0][-1:].isspace()):
            before, so_far = found.pop()
            found.append((before + piece, so_far + value))
        else:
            found.append((piece, value))
    return found


def integrated_gradients(
    f: Callable[[mx.array], mx.array],
    x: mx.array,
    baseline: mx.array,
    *,
    steps: int = STEPS,
    most: int = MOST,
    beside: float = 0.0,
    tell: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, float, float, int, bool]:
    """Attribution of `f(x) - f(baseline)` to the rows of x, by the midpoint rule on the straight way between the two.

    Args:
        f: `[M, T, D]` points to `[M]` values; it may not mix points.
        x, baseline: `[T, D]`.
        steps: points; doubled until attributions add up (`is_complete`) or there would be more than `most`.
        beside: what is known to be added to the difference, whose attribution is exact.
        tell: called with the number of points that are done, and how many there are to be.

    Returns: attributions `[T]`, `f(x)`, `f(baseline)`, the points it took, and whether they add up to within
        0.05 |f(x) - f(baseline) + beside| + 0.001.
    Source: Sundararajan, Taly and Yan 2017, eq. 1 and 3 (arXiv 1703.01365).
    """
    low, high = f(mx.stack([baseline, x])).tolist()
    slope = mx.grad(lambda points: f(points).sum())
    way = x - baseline
    while True:
        shares = (mx.arange(steps) + 0.5)[:, None, None] / steps
        blocks = [shares[first : first + POINTS] for first in range(0, steps, POINTS)]
        total = mx.zeros_like(x)
        for first in range(0, len(blocks), len(lanes())):
            slopes = []
            for lane, block in zip(lanes(), blocks[first:], strict=False):
                with mx.stream(lane):
                    slopes.append(slope(baseline + block * way).sum(0))
            mx.eval(slopes)
            total = total + sum(slopes)
            done = (first + len(lanes())) * POINTS
            if tell and done < steps:
                tell(done, steps)
        found = np.array((way * total).sum(-1), np.float64) / steps
        is_complete = bool(abs(found.sum() - (high - low)) <= RELATIVE * abs(high - low + beside) + ABSOLUTE)
        if is_complete or 2 * steps > most:
            if tell:
                tell(steps, steps)
            return found, high, low, steps, is_complete
        steps *= 2


def explain(
    model: RewardModel,
    prompt: str,
    response: str,
    outputs: Sequence[str],
    *,
    steps: int = STEPS,
    most: int = MOST,
    progress: Progress | None = None,
) -> list[Attribution]:
    """Integrated gradients of some outputs (or `scalar`) with respect to the reply's token vectors; the prompt is held.

    What counts of words add has no gradient but is a sum: each word's part goes to its own tokens, exactly.

    Raises: InputError when the reply says nothing, an output is unknown, or the model has no gradient (`ngram`).
    """
    backbone = _differentiable(model)
    picks = [_pick(model, output) for output in outputs]
    passage = _passage(backbone, prompt, response)
    first, last = passage.said
    x = backbone.reader.embed(mx.array(passage.tokens))
    reply = mx.broadcast_to(_mean_vector(backbone), (last - first, x.shape[1]))
    baseline = mx.concatenate([x[:first], reply, x[last:]])
    pieces = tuple(backbone.reader.pieces(response, passage))
    like = backbone.reader.hidden_states([passage], backbone.spec.layers)
    judge, by_words = model.judge_of((prompt, response)), _by_words(model, prompt, response, pieces)
    made = []
    for output, pick in zip(outputs, picks, strict=True):

        def f(points: mx.array, pick: mx.array = pick) -> mx.array:
            return judge(backbone.features([passage] * len(points), points, like)) @ pick

        def tell(done: int, total: int, output: str = output) -> None:
            if progress:
                progress({"stage": f"words behind {output}", "done": done, "total": total})

        counted = by_words @ np.array(pick, np.float64)
        whole = float(counted.sum())
        values, high, low, taken, is_complete = integrated_gradients(
            f, x, baseline, steps=steps, most=most, beside=whole, tell=tell
        )
        said = tuple((values[first:last] + counted).tolist())
        made.append(Attribution(output, pieces, said, high, low - whole, taken, is_complete))
    return made


def places(model: RewardModel, prompt: str, response: str, outputs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Exactly what the hidden state at each place adds to an output, measured from the training rows' mean.

    A ridge head is linear and `mean`, `max`, `last` and counts of words are sums over places, so this adds up to 1e-6
    of the value; an attention head is a sum over places itself. A state has read its neighbours: this is where a
    judgement was read, not why it was made.

    Returns: by output `values` `[R]`, `elsewhere` (what is read at no single place adds: `std`, `gap`, `judge` and
        others) and `start`, the output at the mean of the training rows' states where no word is counted; all together
        they are the unclipped output.
    """
    backbone, head = _differentiable(model), model.head
    if isinstance(head, AttentionHead):
        parts, start = head.parts(*_states_of(backbone, head, prompt, response))[0], head.start
        return {
            output: {"values": (parts @ pick).tolist(), "elsewhere": 0.0, "start": (start @ pick).item()}
            for output, pick in ((output, _pick(model, output)) for output in outputs)
        }
    passage = backbone.reader.passage(prompt, response)
    first, last = passage.said
    states = backbone.reader.hidden_states([passage], backbone.spec.layers)
    size = states[0].shape[-1]
    weight, mean = _worth(model), np.array(head.feature_mean, np.float64)
    added = _by_words(model, prompt, response, backbone.reader.pieces(response, passage))
    elsewhere = np.zeros(weight.shape[1])
    features = np.array(backbone.features([passage])[0], np.float64)
    names = [(index, pooling) for index in range(len(states)) for pooling in backbone.pooled]
    for number, (layer, pooling) in enumerate(names):
        block = slice(number * size, (number + 1) * size)
        said, w, centre = np.array(states[layer][0, first:last], np.float64), weight[block], mean[block]
        if pooling == "mean":
            added += (said - centre) @ w / len(said)
        elif pooling == "max":
            np.add.at(added, said.argmax(axis=0), (said.max(axis=0) - centre)[:, None] * w)
        elif pooling == "last":
            added[-1] += (said[-1] - centre) @ w
        else:
            elsewhere += (features[block] - centre) @ w
    rest = slice(len(names) * size, len(features))  # of `judge`
    elsewhere += (features[rest] - mean[rest]) @ weight[rest]
    start = np.array(head.bias * head.label_scale + head.label_mean, np.float64)
    found = {}
    for output in outputs:
        pick = np.array(_pick(model, output), np.float64)
        found[output] = {"values": (added @ pick).tolist(), "elsewhere": float(elsewhere @ pick)}
        found[output]["start"] = float(start @ pick)
    return found


def attended(model: RewardModel, prompt: str, response: str, outputs: Sequence[str]) -> dict[str, list[float]]:
    """How much of its look an attention head spends on each token of the reply, by output `[R]`, 1 in all.

    For display only: a state may be looked at and count for nothing, and other looks would judge alike (Jain and
    Wallace 2019, arXiv 1902.10186). Of the scalar it is the weighted mean of the dimensions' looks. Empty with a ridge
    head, which looks at all places alike.
    """
    backbone, head = _differentiable(model), model.head
    if not isinstance(head, AttentionHead):
        return {}
    shares = head.shares(*_states_of(backbone, head, prompt, response))[0]
    return {output: (shares @ _pick(model, output)).tolist() for output in outputs}


def _states_of(backbone: Backbone, head: AttentionHead, prompt: str, response: str) -> tuple[mx.array, mx.array]:
    """The reply's states `[1, R, D]`, and their places `[1, 2]`."""
    states = backbone.states([(prompt, response)], head.layer)[0]
    return mx.array(states)[None], mx.array([(0, len(states))])


def leave_out(model: RewardModel, prompt: str, response: str, outputs: Sequence[str]) -> list[dict[str, Any]]:
    """What is lost when one sentence is left out, or one word where there is only one sentence.

    Returns: for each in order its `text`, its place `start`..`stop` in the reply, and `lost` by output: the unclipped
        output of the whole reply minus that without it.
    """
    spans = _spans(response)
    without = [response[:start] + response[stop:] for start, stop in spans]
    scored = model.score_many([(prompt, text) for text in (response, *without)])
    values = [{**said.unclipped, "scalar": _unclipped_scalar(model, said.unclipped)} for said in scored]
    return [
        {
            "text": response[start:stop].strip(),
            "start": start,
            "stop": stop,
            "lost": {output: values[0][output] - left[output] for output in outputs},
        }
        for (start, stop), left in zip(spans, values[1:], strict=True)
    ]


def agreement(attribution: Attribution, left_out: Sequence[dict[str, Any]]) -> float | None:
    """Rank correlation over sentences (or words) of their attribution with what leaving them out costs.

    None with fewer than three, or where the reply was cut and its pieces do not reach its end.
    """
    if len(left_out) < 3 or sum(map(len, attribution.pieces)) < left_out[-1]["stop"]:
        return None
    ends = np.cumsum([len(piece) for piece in attribution.pieces])
    middles = ends - np.array([len(piece) for piece in attribution.pieces]) / 2
    values = np.array(attribution.values)
    sums = [values[(middles >= unit["start"]) & (middles < unit["stop"])].sum() for unit in left_out]
    found = spearman(np.array(sums), np.array([unit["lost"][attribution.output] for unit in left_out]))
    return None if np.isnan(found) else float(found)


def report(
    model: RewardModel,
    prompt: str,
    response: str,
    outputs: Sequence[str],
    *,
    steps: int = STEPS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """All views of one reply, in JSON's own types; of n-grams, which have no gradient, `left_out` alone.

    Raises: InputError as `explain` does.
    """
    for output in outputs:
        _pick(model, output)
    if isinstance(model.features, Backbone):
        _passage(model.features, prompt, response)
    left = leave_out(model, prompt, response, outputs)
    if not isinstance(model.features, Backbone):
        return {"prompt": prompt, "response": response, "outputs": [], "left_out": left}
    where = places(model, prompt, response, outputs)
    looks = attended(model, prompt, response, outputs)
    told = []
    for found in explain(model, prompt, response, outputs, steps=steps, progress=progress):
        one = asdict(found) | {"words": found.words, "places": where[found.output], "agreement": agreement(found, left)}
        if looks:
            values = looks[found.output]
            one["attention"] = {"values": values, "words": words_of(found.pieces, values), "is_a_cause": False}
        told.append(one)
    return {"prompt": prompt, "response": response, "outputs": told, "left_out": left}


def _worth(model: RewardModel) -> np.ndarray:
    """What one unit of each feature adds to each output, `[F, O]`."""
    head = model.head
    return np.array(head.weight / head.feature_scale[:, None] * head.label_scale, np.float64)


def _by_words(model: RewardModel, prompt: str, response: str, pieces: Sequence[str]) -> np.ndarray:
    """What counts of words add to each output at each token of the reply, `[R, O]`."""
    if model.words is None:
        return np.zeros((len(pieces), len(model.card.outputs)))
    return model.words.added((prompt, response), pieces, _worth(model)[-len(model.words.vocabulary) :])


def _differentiable(model: RewardModel) -> Backbone:
    if not isinstance(model.features, Backbone):
        raise InputError("the n-gram baseline counts pieces of text; only encoder and lm backbones can be explained")
    return model.features


def _passage(backbone: Backbone, prompt: str, response: str) -> Passage:
    passage = backbone.reader.passage(prompt, response)
    if not response.strip() or EMPTY in passage.flags:
        raise InputError("the reply says nothing that could be explained")
    return passage


def _pick(model: RewardModel, output: str) -> mx.array:
    """Weights `[O]` that make one output, or the scalar, of all outputs."""
    names, dimensions = model.card.outputs, model.manifold.dimensions
    if output == "scalar":
        if model.gate is not None:
            raise InputError("the weights of this reward model's scalar hang on the prompt; ask for dimensions instead")
        shares = {dimension.name: dimension.weight for dimension in dimensions}
        return mx.array([shares.get(name, 0.0) / sum(shares.values()) for name in names])
    if output not in names:
        raise InputError(f"{output} is not an output of this reward model; known are {', '.join(names)}, scalar")
    return mx.array([float(name == output) for name in names])


def _unclipped_scalar(model: RewardModel, values: dict[str, float]) -> float:
    return model.manifold.scalar([values[name] for name in model.manifold.names])


def _mean_vector(backbone: Backbone) -> mx.array:
    """Mean `[D]` of all tokens' vectors: a reply that says nothing in particular."""
    size, total = backbone.reader.vocab_size, mx.array(0.0)
    for first in range(0, size, 8192):
        total = total + backbone.reader.embed(mx.arange(first, min(first + 8192, size))).sum(0)
        mx.eval(total)
    return total / size


def _spans(text: str) -> list[tuple[int, int]]:
    """Sentences, or words where there is one sentence; each with the space behind it."""
    cuts = [match.end() for match in SENTENCE.finditer(text.rstrip())]
    if not cuts:
        cuts = [match.end() for match in re.finditer(r"\s+", text.rstrip())]
    bounds = [0, *cuts, len(text)]
    return [(start, stop) for start, stop in itertools.pairwise(bounds) if text[start:stop].strip()]
