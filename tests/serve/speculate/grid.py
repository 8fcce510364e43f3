"""What the exactness tests and the exactness benchmark share: every method, the grid of sampling settings, the law of short texts, the G-test."""

import itertools

import numpy as np
import torch
from scipy.stats import chi2

TEMPERATURES, NUCLEI = (0.2, 0.6, 1.0), (0.9, 1.0)
SAMPLED_GRID = list(itertools.product(TEMPERATURES, NUCLEI))
MATCHING = ("chain", "specinfer-naive", "specexec", "suffix", "suffix-tree", "ngram", "hybrid")
BY_RATIO = ("sequoia", "sequoia-tiny-head", "sequoia-dynamic", "specinfer", "specinfer-merged")
ALLOWED = (3, 4, 5)  # the request allows three tokens, so all texts of three tokens can be counted


def configs(target, draft):
    """Every method, with bad guesses (another random model) and good ones (the target itself)."""
    target, draft = str(target), str(draft)
    return {
        "chain": {"draft": draft, "num_speculative_tokens": 3},
        "sequoia": {"method": "sequoia", "draft": draft, "tree": [-1, -1, 0, 0, 1, 2, 2]},
        "sequoia-perfect": {"method": "sequoia", "draft": target, "tree": [-1, 0, 1, -1, 0, 4]},
        "sequoia-auto": {"method": "sequoia", "draft": target, "max_tree_size": 8, "max_depth": 4},
        "sequoia-dynamic": {"method": "sequoia", "draft": draft, "max_tree_size": 16, "max_depth": 3},
        "sequoia-small-head": {
            "method": "sequoia",
            "draft": target,
            "tree": [-1, -1, 0, 0, 1],
            "draft_vocabulary": 200,
        },
        "sequoia-tiny-head": {"method": "sequoia", "draft": draft, "tree": [-1, -1, -1, 0, 0], "draft_vocabulary": 5},
        "specinfer": {"method": "specinfer", "draft": draft, "expansion": [2, 2, 1]},
        "specinfer-merged": {"method": "specinfer", "drafts": [draft, target], "expansion": [1, 2, 1]},
        "specinfer-naive": {"method": "specinfer", "draft": target, "expansion": [1, 3, 1], "verify": "naive"},
        "specexec": {"method": "specexec", "draft": draft, "budget": 20, "beams": 4, "max_depth": 5},
        "specexec-perfect": {"method": "specexec", "draft": target, "budget": 12, "beams": 3, "max_depth": 6},
        "suffix": {"method": "suffix", "num_speculative_tokens": 8, "suffix_max_spec_factor": 2.0},
        "suffix-tree": {"method": "suffix", "suffix_tree": True, "suffix_max_spec_offset": 2.0},
        "hybrid": {"method": "suffix", "draft": target, "suffix_hybrid_threshold": 2.0},
        "ngram": {"method": "ngram", "num_speculative_tokens": 5},
    }


METHODS = list(configs("", ""))


def tokens_of(outputs):
    return [choice.token_ids for output in outputs for choice in output.outputs]


class TextLaw:
    """The target's own distribution of texts of three tokens among ALLOWED, by its Hugging Face twin."""

    def __init__(self, directory, prompt):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        texts = [list(t) for n in range(3) for t in itertools.product(ALLOWED, repeat=n)]
        self._logits = {}
        with torch.no_grad():
            for text in texts:
                row = model(torch.tensor([prompt + text])).logits[0, -1].double()
                self._logits[tuple(text)] = row[list(ALLOWED)].numpy()

    def following(self, text, temperature, top_p):
        """P(next) over ALLOWED: softmax at the temperature, then the smallest set that reaches top_p."""
        logits = self._logits[text] / temperature
        p = np.exp(logits - logits.max())
        p /= p.sum()
        order = np.argsort(-p, kind="stable")
        kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p - 1e-9)) + 1]
        q = np.zeros(len(ALLOWED))
        q[kept] = p[kept]
        return q / q.sum()

    def at(self, temperature, top_p):
        """{text: probability} of the 27 texts."""
        law = {}
        for text in itertools.product(ALLOWED, repeat=3):
            steps = [self.following(text[:n], temperature, top_p)[ALLOWED.index(text[n])] for n in range(3)]
            law[text] = float(np.prod(steps))
        return law


def g_test(texts, law):
    """p-value of the likelihood-ratio test of these texts; 0 when one of probability 0 occurs."""
    n = len(texts)
    counts = {text: texts.count(text) for text in set(texts)}
    if any(law[text] <= 0 for text in counts):
        return 0.0
    possible = [t for t, p in law.items() if p * n >= 5]
    rest = n - sum(counts.get(t, 0) for t in possible)
    rest_p = max(0.0, 1 - sum(law[t] for t in possible))
    g = 2 * sum(counts[t] * np.log(counts[t] / (n * law[t])) for t in possible if counts.get(t))
    g += 2 * rest * np.log(rest / (n * rest_p)) if rest and rest_p > 1e-9 else 0
    return float(chi2.sf(g, max(len(possible) - (rest_p <= 1e-9), 1)))
