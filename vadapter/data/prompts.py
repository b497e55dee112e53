"""The text around the visual tokens, in training, in language modeling and in evaluation.

The language model reads a sequence of pieces: `before`, visual tokens, `after`, text. Each is
tokenized separately, then they are concatenated. A piece carries its own leading space and never a
trailing one: `after` is " :", and a caption or an answer enters as " " + text.

Source: PaLM2-VAdapter (arXiv:2402.10896), section 3 and Tables 10 and 11. The paper prints the
prompts in slightly different forms; this file fixes one of each.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The text before and after the visual tokens."""

    before: str
    after: str


@dataclasses.dataclass(frozen=True)
class QuestionPrompt:
    """A prompt whose `after` contains the question."""

    before: str
    template: str

    def after(self, question: str) -> str:
        """Return the text between the visual tokens and the answer, on one line."""
        return self.template.replace("{question}", " ".join(question.split()))

    def fill(self, question: str, examples: Sequence[tuple[str, str]] = ()) -> Prompt:
        """Return the complete prompt of a question, after `examples`, (question, answer) pairs.

        They precede it as text, without images. The paper draws four from the training set, as
        Flamingo does; they show the form of an answer.
        """
        # `before` ends with "Given". Without visual tokens, the full stop after them is left out.
        shown = "".join(self.shown(q, a).removeprefix(".") for q, a in examples)
        return Prompt(self.before + shown, self.after(question))

    def shown(self, question: str, answer: str) -> str:
        """Return the text after the image of an example, up to the next image."""
        return f"{self.after(question)} {answer} Given"


CAPTION = Prompt(before="Describe the following:", after=" :")
QUESTION = QuestionPrompt(
    before="Answer the question given the images. Given",
    template=". Question: {question} Answer:",
)
# The video benchmarks compare a single word.
VIDEO_QUESTION = QuestionPrompt(
    before=QUESTION.before,
    template=". Question: {question} Answer in exactly one word:",
)
# LLaVA's results on VizWiz rely on this sentence; the paper's prompt does not have it.
UNANSWERABLE = QuestionPrompt(
    before=QUESTION.before,
    template=". Question: {question} When the provided information is insufficient, respond with "
    "'Unanswerable'. Answer:",
)


def text_piece(text: str) -> str:
    """Return a caption or an answer as the piece after `after`: one line, one leading space."""
    return " " + " ".join(text.split())
