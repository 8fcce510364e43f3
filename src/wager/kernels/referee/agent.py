"""A language model behind any OpenAI-compatible endpoint as the proposer: it reads the operator and the last reports, and answers with a source.

What it answers is a candidate like every other: a source without the class, without sense or with a cheat gets its verdict and is reported
back. Nothing of it runs outside the judge's workers.
"""

from __future__ import annotations

import inspect
import json
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from wager.errors import WagerError
from wager.kernels.referee import oracle
from wager.kernels.referee.search import Attempt, report

REPORTS = 3  # earlier attempts that the model is shown
TASK = """Write a faster version of this PyTorch operator for a CPU. Answer with one Python code block that defines class {operator} with the
same constructor, parameters and forward. Do not change inputs, do not keep results, keep float32 accuracy, and do not fall back to the original.

```python
{baseline}
```
"""


@dataclass
class Endpoint:
    """Asks `model` at `base_url` (ending in /v1) for `attempts` sources of one operator."""

    base_url: str
    model: str
    operator: str
    attempts: int
    api_key: str = ""
    max_tokens: int = 1024
    timeout_s: float = 120.0

    def propose(self, history: Sequence[Attempt]) -> str | None:
        """Raises WagerError when the endpoint cannot be used."""
        if len(history) >= self.attempts:
            return None
        return code_of(self._ask(self.messages(history)))

    def messages(self, history: Sequence[Attempt]) -> list[dict[str, str]]:
        baseline = inspect.getsource(oracle.baseline_class(self.operator)).replace("(Operator)", "(nn.Module)")
        said = [{"role": "user", "content": TASK.format(operator=self.operator, baseline=baseline)}]
        for attempt in history[-REPORTS:]:
            said.append({"role": "assistant", "content": f"```python\n{attempt.source}\n```"})
            said.append(
                {"role": "user", "content": f"The judge says:\n{report(attempt)}\nAnswer with a better version."}
            )
        return said

    def _ask(self, messages: list[dict[str, str]]) -> str:
        body = {"model": self.model, "messages": messages, "max_tokens": self.max_tokens}
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        )
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                return json.loads(answer.read())["choices"][0]["message"]["content"] or ""
        except urllib.error.HTTPError as error:
            raise WagerError(f"{url} answered {error.code}: {error.read()[:300].decode(errors='replace')}") from None
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise WagerError(
                f"{url} gave no answer that can be read ({error}); is it an OpenAI-compatible endpoint?"
            ) from None


def code_of(text: str) -> str:
    """The last fenced block of an answer, or all of it where there is none."""
    blocks = re.findall(r"```[a-zA-Z]*\n(.*?)```", text, re.DOTALL)
    return blocks[-1] if blocks else text
