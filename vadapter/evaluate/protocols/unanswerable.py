"""The paper's protocol for VizWiz with the sentence that LLaVA-style results assume.

No model guesses the word `unanswerable`, a third of the answers, unless the prompt mentions it.
"""

import dataclasses

from vadapter.evaluate.protocols import paper

PROTOCOL = {
    "vizwiz": dataclasses.replace(
        paper.PROTOCOL["vizwiz"], name="unanswerable", prompt="unanswerable"
    )
}
