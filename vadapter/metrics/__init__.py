"""Captioning and VQA metrics in plain Python and NumPy, equal to the official scorers.

  ptb              tokenizer of the COCO caption metrics: Stanford's PTBTokenizer without Java
  captioning       CIDEr-D, BLEU and ROUGE-L, equal to pycocoevalcap 1.2 per item to 1e-9
  ngrams           n-gram counts of a whole test set at once, which makes `captioning` fast
  vqa              accuracy by the official rules of VQAv2, OK-VQA, TextVQA, VizWiz, iVQA, MSRVTT-QA
                   and MSVD-QA, and by the rules of other papers under names of their own
  bootstrap        95 % intervals of scores and paired tests of two systems, over images or clips
  judgments        shares of captions, and of facts in them, that the source finds right
  blind_baselines  scores that need no image: the best constant caption, the majority answer
  scoring          `METRICS`, which names the metric of each benchmark, and `score_generations`

The official scripts have quirks, such as a normalization that is skipped where all annotators
agree. Published numbers contain them, so they are reproduced; each is marked `Quirk` in the code.
METEOR and SPICE, which need Java models, are not included.

`scoring` imports a scorer when it is used: training does not load them.
"""
