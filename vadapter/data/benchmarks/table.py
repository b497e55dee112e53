"""The twelve benchmarks: ten of the paper, and Flickr8k and DAQUAR, which are small and open.

A row says what is official: counts, file names and pages. Nothing is downloaded, since most of the
sets ask for a form or have no stable address; `vadapter data doctor NAME` lists what is missing.
Licenses: annotations are CC BY 4.0 where nothing else is said. Images belong to their Flickr owners
and clips to their YouTube owners, who remove some of them, so that a copy of clips is seldom
complete.
"""

from functools import partial

from vadapter.config import require_one_of
from vadapter.data.benchmarks import formats
from vadapter.data.benchmarks.benchmark import Benchmark, Counts, File, MediaSet

KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/"
COCO = "https://cocodataset.org/#download"
FLICKR8K = "https://hockenmaier.cs.illinois.edu/8k-images.html"
MSRVTT = (
    "https://www.microsoft.com/en-us/research/publication/"
    "msr-vtt-a-large-video-description-dataset-for-bridging-video-and-language/"
)
VATEX = "https://eric-xw.github.io/vatex-website/download.html"
VQA = "https://visualqa.org/download.html"
OKVQA = "https://okvqa.allenai.org/download.html"
TEXTVQA = "https://textvqa.org/dataset/"
VIZWIZ = "https://vizwiz.org/tasks-and-datasets/vqa/"
VIDEO_QA = "https://github.com/xudejing/video-question-answering"
MSVD = "https://www.cs.utexas.edu/~ml/clamp/videoDescription/"
IVQA = "https://antoyang.github.io/just-ask.html#ivqa"
DAQUAR = (
    "https://www.mpi-inf.mpg.de/departments/computer-vision-and-machine-learning/research/"
    "vision-and-language/visual-turing-challenge"
)


def _same(*splits: str) -> dict[str, str]:
    """Return the splits of a file that carries the name of the split."""
    return {split: split for split in splits}


def _counts(per_item: int | None, **splits: tuple[int, int]) -> dict[str, Counts]:
    """Return the counts of splits, given as (images or clips, captions or questions)."""
    return {name: Counts(*sizes, per_item) for name, sizes in splits.items()}


TRAIN_VAL = {"train": "train2014", "val": "val2014"}  # parts of COCO
VQA_IMAGES = {**TRAIN_VAL, "test-dev": "test2015", "test": "test2015"}
THREE = _same("train", "val", "test")

# MSRVTT-QA asks about the same clips.
MSRVTT_CLIPS = (
    MediaSet(
        ("TrainValVideo", "videos/all"), MSRVTT, _same("train", "val"), ("train_val_videos.zip",)
    ),
    MediaSet(("TestVideo", "videos/all"), MSRVTT, _same("test"), ("test_videos.zip",)),
)

_ROWS = (
    # Karpathy's split, with the "restval" images in train; a few images have more than five
    # captions.
    Benchmark(
        name="coco", task="caption", media="image", homepage=KARPATHY,
        splits=_counts(None, train=(113_287, 566_747), val=(5_000, 25_010), test=(5_000, 25_010)),
        files=(File("dataset_coco.json", KARPATHY, THREE, ("caption_datasets.zip",)),),
        media_sets=(
            MediaSet(("val2014",), COCO, THREE, ("val2014.zip",)),
            MediaSet(("train2014",), COCO, _same("train"), ("train2014.zip",)),
        ),
        reader=partial(formats.karpathy, values={"train": ("train", "restval")}),
    ),
    # License: for research. The page's download links come and go.
    Benchmark(
        name="msrvtt", task="caption", media="clip", homepage=MSRVTT,
        splits=_counts(20, train=(6_513, 130_260), val=(497, 9_940), test=(2_990, 59_800)),
        files=(
            File("{split}_videodatainfo.json", MSRVTT,
                 {"train": "train_val", "val": "train_val", "test": "test"},
                 ("train_val_annotation.zip", "test_videodatainfo*.zip")),
        ),
        media_sets=MSRVTT_CLIPS, reader=formats.msrvtt,
    ),
    # English captions. Clips are the user's own, named by "videoID": <YouTube id>_<start>_<end>,
    # six digits each.
    Benchmark(
        name="vatex", task="caption", media="clip", homepage=VATEX,
        splits=_counts(10, train=(25_991, 259_910), val=(3_000, 30_000), test=(6_000, 60_000)),
        files=(
            File("vatex_{split}.json", VATEX,
                 {"train": "training_v1.0", "val": "validation_v1.0",
                  "test": "public_test_english_v1.1"}),
        ),
        media_sets=(MediaSet(("videos",), VATEX, THREE),), reader=formats.vatex,
    ),
    # Answers of test-dev and test are not public: the challenge's server scores the submission
    # file. Scores are broken down by "answer_type".
    Benchmark(
        name="vqav2", task="question", media="image", homepage=VQA, default_split="val",
        splits=_counts(10, train=(82_783, 443_757), val=(40_504, 214_354))
        | _counts(0, **{"test-dev": (36_807, 107_394), "test": (81_434, 447_793)}),
        files=(
            File("v2_OpenEnded_mscoco_{split}_questions.json", VQA,
                 {**TRAIN_VAL, "test-dev": "test-dev2015", "test": "test2015"},
                 ("v2_Questions_*_mscoco.zip",)),
            File("v2_mscoco_{split}_annotations.json", VQA, TRAIN_VAL,
                 ("v2_Annotations_*_mscoco.zip",)),
        ),
        media_sets=(MediaSet(("{split}",), VQA, VQA_IMAGES, ("{split}.zip",)),),
        reader=partial(formats.vqa, images=VQA_IMAGES, kind="answer_type"),
    ),
    # Version 0.5.1. Some images (of Open Images, CC BY 2.0) are stored rotated and are read as
    # stored; OCR tokens are not read. Answers of test are not public.
    Benchmark(
        name="textvqa", task="question", media="image", homepage=TEXTVQA, default_split="val",
        splits=_counts(10, train=(21_953, 34_602), val=(3_166, 5_000))
        | _counts(0, test=(3_289, 5_734)),
        files=(File("TextVQA_0.5.1_{split}.json", TEXTVQA, THREE),),
        media_sets=(
            MediaSet(("train_images",), TEXTVQA, _same("train", "val"), ("train_val_images.zip",)),
            MediaSet(("test_images",), TEXTVQA, _same("test"), ("test_images.zip",)),
        ),
        reader=formats.textvqa,
    ),
    # Photos of blind people, one question each. "unanswerable" is an answer like any other, and a
    # few answers are blank. Answers of test are not public.
    Benchmark(
        name="vizwiz", task="question", media="image", homepage=VIZWIZ, default_split="val",
        splits=_counts(10, train=(20_523, 20_523), val=(4_319, 4_319))
        | _counts(0, test=(8_000, 8_000)),
        files=(
            File("{split}.json", VIZWIZ, THREE, ("Annotations.zip",),
                 ("Annotations", "annotations")),
        ),
        media_sets=(MediaSet(("{split}",), VIZWIZ, THREE, ("{split}.zip",)),),
        reader=formats.vizwiz,
    ),
    # The ten answers are those of five annotators, stemmed, each twice, as in the official files
    # ("raw_answer" is not read). Scores are broken down by "question_type".
    Benchmark(
        name="okvqa", task="question", media="image", homepage=OKVQA, default_split="val",
        splits=_counts(10, train=(8_998, 9_009), val=(5_033, 5_046)),
        files=(
            File("OpenEnded_mscoco_{split}_questions.json", OKVQA, TRAIN_VAL,
                 ("OpenEnded_mscoco_*.json.zip",)),
            File("mscoco_{split}_annotations.json", OKVQA, TRAIN_VAL,
                 ("mscoco_*_annotations.json.zip",)),
        ),
        media_sets=(MediaSet(("{split}",), OKVQA, TRAIN_VAL, ("{split}.zip",)),),
        reader=partial(formats.vqa, images=TRAIN_VAL, kind="question_type"),
    ),
    # License: for research. One answer of one word.
    Benchmark(
        name="msrvtt_qa", task="question", media="clip", homepage=VIDEO_QA,
        splits=_counts(1, train=(6_513, 158_581), val=(497, 12_278), test=(2_990, 72_821)),
        files=(File("{split}_qa.json", VIDEO_QA, THREE),),
        media_sets=MSRVTT_CLIPS, reader=formats.video_qa,
    ),
    # License: for research. One answer of one word. The counts are of clips that have questions.
    Benchmark(
        name="msvd_qa", task="question", media="clip", homepage=VIDEO_QA,
        splits=_counts(1, train=(1_161, 30_933), val=(245, 6_415), test=(504, 13_157)),
        files=(
            File("{split}_qa.json", VIDEO_QA, THREE),
            File("youtube_mapping.txt", VIDEO_QA, THREE),
        ),
        media_sets=(MediaSet(("YouTubeClips",), MSVD, THREE, ("YouTubeClips.tar",)),),
        reader=formats.video_qa,
    ),
    # License: for research. Clips are the user's own, cut and named <video_id>_<start>_<end>.
    Benchmark(
        name="ivqa", task="question", media="clip", homepage=IVQA,
        splits=_counts(None, train=(5_994, 5_994), val=(2_000, 2_000), test=(2_000, 2_000)),
        files=(File("{split}.csv", IVQA, THREE),),
        media_sets=(MediaSet(("video",), IVQA, THREE),), reader=formats.ivqa,
    ),
    # License: captions for non-commercial research and education. Karpathy's file has the splits
    # of the authors.
    Benchmark(
        name="flickr8k", task="caption", media="image", homepage=FLICKR8K,
        splits=_counts(5, train=(6_000, 30_000), val=(1_000, 5_000), test=(1_000, 5_000)),
        files=(
            File("captions.jsonl", KARPATHY, THREE, ("caption_datasets.zip",),
                 aliases=("dataset_flickr8k.json",)),
        ),
        media_sets=(
            MediaSet(("Flicker8k_Dataset",), FLICKR8K, THREE,
                     ("{split}-*.tar", "Flickr8k_Dataset.zip")),
        ),
        reader=formats.karpathy,
    ),
    # The full set, about indoor photos of NYU Depth v2. License: for research. The counts are those
    # of the files; the paper counts 6,794 and 5,674 questions.
    Benchmark(
        name="daquar", task="question", media="image", homepage=DAQUAR,
        splits=_counts(1, train=(794, 6_795), test=(653, 5_673)),
        files=(
            File("qa.jsonl", DAQUAR, _same("train", "test"), aliases=("qa.894.raw.{split}.txt",)),
        ),
        media_sets=(
            MediaSet(("nyu_depth_images",), DAQUAR, _same("train", "test"),
                     ("{split}-*.tar", "nyu_depth_images.tar")),
        ),
        reader=formats.daquar,
    ),
)  # fmt: skip

BENCHMARKS: dict[str, Benchmark] = {row.name: row for row in _ROWS}


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark of that name.

    Raises:
      ConfigError: there is none; names the nearest.
    """
    require_one_of(f"benchmark {name!r}", name, BENCHMARKS)
    return BENCHMARKS[name]
