"""The words around the visual tokens, in training, in language modeling and in evaluation.

Everything the language model reads is a run of pieces, `before`, visual tokens, `after`, text,
each tokenized by itself and concatenated. A piece carries its own leading space and never a
trailing one: `after` is " :", and a caption or an answer enters as " " + text.

Source: PaLM2-VAdapter (arXiv:2402.10896), section 3 and Tables 10 and 11. The paper prints the
prompts in slightly different forms; this file fixes one of each.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What stands in front of (`before`) and behind (`after`) the visual tokens."""

    before: str
    after: str


@dataclasses.dataclass(frozen=True)
class QuestionPrompt:
    """A prompt whose `after` holds the question."""

    before: str
    template: str

    def after(self, question: str) -> str:
        """The text between the visual tokens and the answer, one line, no trailing space."""
        return self.template.replace("{question}", " ".join(question.split()))

    def fill(self, question: str, examples: Sequence[tuple[str, str]] = ()) -> Prompt:
        """The whole prompt of one question.

        Args:
          question: the question about the image.
          examples: (question, answer) pairs shown as text alone, without an image. The paper
            draws four from the training set, as Flamingo does; they tell the model the form of
            an answer.
        """
        # An example follows "Given" at once: the full stop closes the visual tokens it lacks.
        shown = "".join(self.shown(q, a).removeprefix(".") for q, a in examples)
        return Prompt(self.before + shown, self.after(question))

    def shown(self, question: str, answer: str) -> str:
        """What stands behind the image of an example, up to the next image."""
        return f"{self.after(question)} {answer} Given"


CAPTION = Prompt(before="Describe the following:", after=" :")
QUESTION = QuestionPrompt(
    before="Answer the question given the images. Given",
    template=". Question: {question} Answer:",
)
# The video benchmarks score one word against one word.
VIDEO_QUESTION = QuestionPrompt(
    before=QUESTION.before,
    template=". Question: {question} Answer in exactly one word:",
)
# LLaVA's results on VizWiz assume this sentence; the paper's prompt is without it.
UNANSWERABLE = QuestionPrompt(
    before=QUESTION.before,
    template=". Question: {question} When the provided information is insufficient, respond with "
    "'Unanswerable'. Answer:",
)


def text_piece(text: str) -> str:
    """A caption or an answer as the piece that follows `after`: one line, one leading space."""
    return " " + " ".join(text.split())
