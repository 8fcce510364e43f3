"""The sampler as engine.md writes it, one row at a time in NumPy float64: the oracle of the vectorised one."""

import numpy as np
from scipy import stats


def edited(logits, params, prompt=(), output=(), eos=(), bad_words=()):
    """Allowed tokens, bad words, minimum length, bias; then repetition, frequency and presence penalties."""
    x = np.array(logits, dtype=np.float64)
    output = list(output)
    if params.allowed_token_ids is not None:
        keep = np.full(len(x), -np.inf)
        keep[list(params.allowed_token_ids)] = 0.0
        x = x + keep
    for word in bad_words:
        head = list(word[:-1])
        if not head or output[-len(head) :] == head:
            x[word[-1]] = -np.inf
    if len(output) < params.min_tokens:
        x[[*eos, *params.stop_token_ids]] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in {*prompt, *output}:
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return x


def normalised(weights):
    return weights / weights.sum()


def softmax(x):
    return normalised(np.exp(x - x.max()))


def min_p(probs, p):
    return normalised(np.where(probs >= p * probs.max(), probs, 0.0))


def top_k(probs, k):
    keep = np.argsort(-probs, kind="stable")[: k if k > 0 else len(probs)]
    out = np.zeros_like(probs)
    out[keep] = probs[keep]
    return normalised(out)


def top_p(probs, p):
    """The smallest set of likely tokens whose mass reaches p; never empty."""
    if p >= 1:
        return probs
    order = np.argsort(-probs, kind="stable")
    count = int(np.searchsorted(np.cumsum(probs[order]), p * (1 - 1e-12))) + 1
    out = np.zeros_like(probs)
    out[order[:count]] = probs[order[:count]]
    return normalised(out)


def distribution(logits, params, **context):
    """What a token is drawn from."""
    x = edited(logits, params, **context)
    if params.temperature < 1e-5:
        return np.eye(len(x))[int(np.argmax(x))]
    return top_p(top_k(min_p(softmax(x / params.temperature), params.min_p), params.top_k), params.top_p)


def fits(tokens, probs, significance=1e-4):
    """Chi-square: whether the tokens may have been drawn from `probs`. A token of no probability decides at once."""
    observed = np.bincount(np.asarray(tokens), minlength=len(probs)).astype(float)
    if observed[probs == 0].any():
        return False
    expected = probs * observed.sum()
    rare = expected < 5
    bins = [(observed[~rare], expected[~rare])]
    if expected[rare].sum() > 0:
        bins.append((observed[rare].sum(keepdims=True), expected[rare].sum(keepdims=True)))
    seen, wanted = (np.concatenate(column) for column in zip(*bins, strict=True))
    if len(seen) < 2:
        return True
    return stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > significance
