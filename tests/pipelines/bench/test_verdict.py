"""What the figures say: a pure function of them."""

from dataclasses import replace

import pytest

from pipelines.bench.stages import COPY
from pipelines.bench.verdict import Figures, advice, find_bound

# Seconds an image on one core: two cores make 2 / 2.5e-3 = 800 images a second.
STAGES_S = {"draw": 1e-5, "decode": 1.5e-3, "crop and resize": 4e-4, "pixel op": 5.9e-4, "loader": 2.5e-3}
FIGURES = Figures(
    engines_img_per_s={"ffcv": 800.0, "torch": 60.0},
    synthetic_img_per_s=3000.0,
    disk_img_per_s=4000.0,
    disk_sequential_img_per_s=5000.0,
    stages_s=STAGES_S,
    num_threads=2,
    num_cores=2,
    num_file_bytes=140_000_000_000,
    fits_in_memory=False,
    image_px=500,
    view_px=224,
    blurs=True,
)
# The pixel op is the GPU's, a tenth of a millisecond an image.
ON_GPU = replace(
    FIGURES,
    stages_s=STAGES_S | {"pixel op": 1e-4, COPY: 2e-4},
    synthetic_img_per_s=5000.0,
    disk_img_per_s=9000.0,
    num_threads=16,
    num_cores=16,
)


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({}, "decode"),
        ({"disk_img_per_s": 799.0}, "disk"),
        ({"disk_img_per_s": 799.0, "fits_in_memory": True}, "decode"),  # only the first epoch waits
        ({"disk_img_per_s": None}, "decode"),
        ({"disk_img_per_s": 799.0, "engines_img_per_s": {"ffcv": 500.0, "resident": 900.0}}, "augmentation"),
        ({"stages_s": STAGES_S | {"crop and resize": 1.6e-3}}, "crop and resize"),
        ({"stages_s": STAGES_S | {"draw": 1.1e-3}}, "augmentation"),  # draw and pixel op together
        ({"stages_s": {name: s for name, s in STAGES_S.items() if name != "decode"}}, "augmentation"),
        ({"synthetic_img_per_s": 880.0}, "nothing"),
        ({"synthetic_img_per_s": 900.0}, "decode"),
        ({"synthetic_img_per_s": None}, "decode"),
        ({"synthetic_img_per_s": 880.0, "disk_img_per_s": 100.0}, "disk"),
    ],
)
def test_bound_on_cores(changes, bound):
    assert find_bound(replace(FIGURES, **changes)) == bound


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({"engines_img_per_s": {"ffcv": 4200.0}}, "copy to GPU"),  # 5000 a second; the cores would make 8,377
        ({"engines_img_per_s": {"ffcv": 3200.0}, "num_threads": 8}, "decode"),  # the cores make 4,188
        ({"stages_s": ON_GPU.stages_s | {"pixel op": 3e-4}, "engines_img_per_s": {"ffcv": 3000.0}}, "augmentation"),
        # It cuts on the GPU: nothing is copied, and what is left of the cores' work is not augmentation.
        ({"engines_img_per_s": {"dali": 4200.0}, "stages_s": ON_GPU.stages_s | {COPY: 1e-3}}, "decode"),
    ],
)
def test_bound_on_a_gpu(changes, bound):
    assert find_bound(replace(ON_GPU, **changes)) == bound


def test_decode_names_smaller_images_cores_and_dali_and_says_how_much():
    what, change = advice(FIGURES)
    assert what == (
        "Decoding bounds this machine: engine ffcv loads 800 images a second of 3,000 that the synthetic one makes, "
        "and 60% of an image's time goes there."
    )
    assert change == (
        "To change that: smaller images (`fastssl convert --max-px 448`; half of them have 500 px or more); "
        "or more cores (data.num_workers=0 and run.num_threads=0 take all); or a GPU with data.engine=dali."
    )


def test_small_images_are_not_to_be_made_smaller_and_idle_cores_are_to_be_used():
    _, change = advice(replace(FIGURES, image_px=448, num_threads=1, num_cores=2))
    assert "--max-px" not in change
    assert "more threads (data.num_workers=2, run.num_threads=2)" in change


def test_the_disk_is_named_with_its_own_speed_and_what_replaces_it():
    what, change = advice(replace(FIGURES, disk_img_per_s=300.0, disk_sequential_img_per_s=440.0))
    assert what.startswith("The disk bounds this machine: in an epoch's order it gives 300 images a second")
    assert "too small for the file (140.0 GB)" in what
    assert "a faster disk" in change
    assert "--max-px 448" in change


def test_a_disk_that_is_faster_in_sequence_names_the_quasi_random_order():
    figures = replace(FIGURES, disk_img_per_s=300.0)
    assert "data.order=quasi_random (in sequence the disk gives 5,000)" in advice(figures)[1]
    assert "data.order" not in advice(replace(figures, disk_sequential_img_per_s=440.0))[1]
    assert "data.order" not in advice(replace(figures, disk_sequential_img_per_s=None))[1]


def test_a_reached_ceiling_is_no_complaint():
    what, change = advice(replace(FIGURES, synthetic_img_per_s=850.0))
    assert what == (
        "Nothing bounds this machine but the synthetic ceiling, which is reached: engine ffcv loads 800 images a "
        "second of 850 that the synthetic one makes."
    )
    assert "run.num_threads" in change
    assert "views.override={blur_p: 0.1}" in change


def test_without_blur_less_blur_is_no_advice():
    assert "blur" not in " ".join(advice(replace(FIGURES, synthetic_img_per_s=850.0, blurs=False)))


def test_a_faster_engine_is_the_third_sentence():
    sentences = advice(replace(FIGURES, engines_img_per_s={"ffcv": 800.0, "resident": 1600.0}))
    assert len(sentences) == 3
    assert sentences[2] == "data.engine=resident is 2.0 times as fast here as ffcv."
    assert len(advice(replace(FIGURES, engines_img_per_s={"ffcv": 800.0, "resident": 830.0}))) == 2


def test_a_disk_that_only_the_first_epoch_waits_for_is_the_third_sentence():
    sentences = advice(replace(FIGURES, disk_img_per_s=300.0, fits_in_memory=True))
    assert sentences[2].startswith("The first epoch waits for the disk, which gives 300 images a second")


def test_the_copy_names_engines_that_cut_on_the_gpu():
    what, change = advice(replace(ON_GPU, engines_img_per_s={"ffcv": 4200.0}))
    assert what.startswith("The copy to the GPU bounds this machine: engine ffcv loads 4,200 images a second")
    assert "views.size_px" in change
    assert "data.engine=dali or resident" in change
