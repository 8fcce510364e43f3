"""A bound on the tokens a reasoning model thinks before it answers.

When the budget is used up, the closing tag is forced token by token; then the model goes on freely. Where the thoughts begin and end is
read from the text, so tags that the vocabulary splits count like tags that are one token.
"""

from __future__ import annotations

from collections.abc import Sequence

from wager.serve.text.reasoning import CLOSE, OPEN
from wager.serve.text.tokenizer import Tokenizer

TAG_TOKENS = 16  # a tag takes at most so many tokens, plus what shares its first and last


class ThinkingBudget:
    """Counts the thinking tokens of one request. `limit`: tokens between the tags; 0 closes the thoughts at once."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], limit: int):
        self._tokenizer, self.limit = tokenizer, limit
        self._close_ids = tokenizer.encode(CLOSE, add_special_tokens=False)
        self._thinking = self._text(prompt_token_ids[-TAG_TOKENS:]).rstrip().endswith(OPEN)
        self._ended = False
        self._tail: list[int] = []
        self._seen = self._spent = 0

    def forced(self, output_token_ids: Sequence[int], guesses: Sequence[int] = ()) -> int | None:
        """The token that must follow the output and the guessed path, or None. The output only ever grows between calls."""
        for token in output_token_ids[self._seen :]:
            self._advance(token)
        self._seen = len(output_token_ids)
        if self._ended or not guesses:
            return self._due()
        kept = self._thinking, self._ended, list(self._tail), self._spent
        for token in guesses:
            self._advance(token)
        due = self._due()
        self._thinking, self._ended, self._tail, self._spent = kept
        return due

    def _advance(self, token: int) -> None:
        if self._ended:
            return
        self._tail = [*self._tail[-TAG_TOKENS + 1 :], token]
        self._spent += self._thinking
        text = self._text(self._tail)
        if self._thinking:
            self._ended = CLOSE in text
            self._thinking = not self._ended
            return
        said = text.lstrip()
        if said.startswith(OPEN):
            self._thinking, self._tail = True, []
        elif not OPEN.startswith(said):
            self._ended = True  # an answer without thoughts

    def _due(self) -> int | None:
        """The next token of the closing tag once the budget is spent; a tag that has begun is finished."""
        if not self._thinking or self._spent < self.limit:
            return None
        most = min(len(self._close_ids) - 1, len(self._tail))
        begun = next((n for n in range(most, 0, -1) if self._tail[-n:] == self._close_ids[:n]), 0)
        return self._close_ids[begun]

    def _text(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
