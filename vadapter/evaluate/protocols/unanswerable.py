"""The paper's protocol with the sentence that LLaVA-style results on VizWiz assume.

Without being told so no model guesses the word `unanswerable`, which is a third of the answers.
"""

import dataclasses

from vadapter.evaluate.protocols import paper

PROTOCOL = {
    "vizwiz": dataclasses.replace(
        paper.PROTOCOL["vizwiz"], name="unanswerable", prompt="unanswerable"
    )
}
