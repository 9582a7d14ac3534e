"""Classes of arrays and of image files, and how sure the network is of them."""

import io
import runpy
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.Image import Resampling, Transpose

from fashion_jax import CLASS_NAMES, FashionMLP, TrainConfig, fit
from fashion_jax.interop import load_safetensors, save_safetensors
from fashion_jax.predict import CHUNK, LANES, LARGE_CHUNK, MAX_PIXELS, _chunks, predict, predict_mc, read_image
from fashion_jax.train import init_state

KEY = jax.random.key(5)
MC = {"key": KEY, "samples": 37, "dropout_rate": 0.3}
COMPILATION = "/jax/core/compile/backend_compile_duration"
CLASSIFY = Path(__file__).parents[1] / "examples" / "classify.py"
# How a camera that was held so stores what is seen upright.
STORED = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}


@pytest.fixture(scope="module")
def params(trained):
    return trained.state.params


def float64_probabilities(params, images):
    x = ((np.asarray(images, np.float64) / 255 - 0.5) / 0.5).reshape(len(images), -1)
    for i in range(1, 5):
        layer = {name: np.asarray(leaf, np.float64) for name, leaf in params[f"fc{i}"].items()}
        x = x @ layer["kernel"] + layer["bias"]
        x = np.maximum(x, 0) if i < 4 else x
    exp = np.exp(x - x.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def test_accuracy_is_that_of_fit_exactly(trained, splits, small):
    run = fit(small, splits.test, key=KEY, epochs=1)
    for state, history, _ in (trained, run):
        predicted = predict(state.params, splits.test.images).argmax(axis=1)
        correct = int((predicted == splits.test.labels).sum())
        # The compiled program multiplies by 1/10,000, which is rounded; the count is not.
        assert correct == round(10_000 * float(history.validation.accuracy[-1]))


def test_probabilities_against_float64_numpy(params, splits):
    expected = float64_probabilities(params, splits.test.images)
    np.testing.assert_allclose(predict(params, splits.test.images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3])
def test_every_number_of_images_gives_the_same_rows(params, splits, n):
    images = splits.test.images[: 10 * CHUNK]
    rows = predict(params, images[:n])
    assert rows.shape == (n, 10)
    np.testing.assert_allclose(rows, predict(params, images)[:n], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(rows, predict(params, jnp.array(images[:n])))


def test_a_gpu_takes_larger_chunks_and_gives_the_same_rows(params, splits, monkeypatch):
    images = splits.test.images[: LARGE_CHUNK + 5]
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    expected, expected_mc = predict(params, images), predict_mc(params, images, **MC)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [len(chunk) for chunk, _ in _chunks(images)] == [LARGE_CHUNK, LARGE_CHUNK]
    np.testing.assert_allclose(predict(params, images), expected, rtol=1e-5, atol=1e-6)
    for actual, leaf in zip(predict_mc(params, images, **MC), expected_mc, strict=True):
        np.testing.assert_allclose(actual, leaf, atol=1e-5)


def test_the_network_is_traced_for_the_first_images_only(small):
    traced = []

    def model(dropout_rate):
        traced.append(dropout_rate)
        return FashionMLP((8,), dropout_rate)

    config = TrainConfig(model=model)
    params = init_state(KEY, config=config).params
    predict(params, small.images[:1], config=config)
    before = len(traced)
    predict(params, small.images[1:5], config=config)
    assert len(traced) == before


def test_no_number_of_images_or_samples_and_no_rate_compiles_a_second_program(params, splits):
    images = splits.test.images[:100]
    predict(params, images[:1])
    predict_mc(params, images[:1], key=jax.random.key(1), samples=1, dropout_rate=0.1)
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))
    try:
        for n in (2, 70, 100):
            predict(params, images[:n])
            predict_mc(params, images[:n], key=jax.random.key(n), samples=n, dropout_rate=n / 200)
        assert COMPILATION not in events
        jax.jit(lambda x: x + len(events))(1)
        assert COMPILATION in events
    finally:
        jax.monitoring.clear_event_listeners()


def test_monte_carlo_is_a_loop_over_thinned_networks(params, splits):
    images = splits.test.images[:5]
    model = FashionMLP(dropout_rate=0.3)

    @jax.jit
    def log_probs(image, sample):
        rngs = {"dropout": jax.random.fold_in(KEY, sample)}
        return model.apply({"params": params}, image[None], deterministic=False, rngs=rngs)[0]

    drawn = np.exp(np.array([[log_probs(image, sample) for image in images] for sample in range(37)], np.float64))
    sampled = predict_mc(params, images, **MC)
    mean = drawn.mean(axis=0)
    np.testing.assert_allclose(sampled.probabilities, mean, atol=1e-6)
    np.testing.assert_allclose(sampled.spread, drawn.std(axis=0), atol=1e-5)
    np.testing.assert_allclose(sampled.entropy, -(mean * np.log(mean)).sum(axis=1), atol=1e-5)
    # The mutual information is also the mean divergence of the samples from their mean.
    divergence = (drawn * np.log(drawn / mean)).sum(axis=2).mean(axis=0)
    np.testing.assert_allclose(sampled.mutual_information, divergence, atol=1e-5)


def test_what_is_said_of_an_image_does_not_depend_on_the_others(params, splits):
    images = splits.test.images[: 2 * CHUNK]
    together = predict_mc(params, images, **MC)
    alone = predict_mc(params, images[CHUNK + 3 : CHUNK + 4], **MC)
    for leaf, whole in zip(alone, together, strict=True):
        np.testing.assert_allclose(leaf[0], whole[CHUNK + 3], atol=1e-5)


def test_uncertainty_has_its_bounds(params, splits):
    noise = np.random.default_rng(0).integers(0, 256, (100, 28, 28), np.uint8)
    for images in (splits.test.images[:100], noise):
        sampled = predict_mc(params, images, **MC)
        np.testing.assert_allclose(sampled.probabilities.sum(axis=1), 1, atol=1e-5)
        assert (sampled.mutual_information >= 0).all()
        assert (sampled.mutual_information <= sampled.entropy).all()
        assert (sampled.entropy <= np.log(10) + 1e-6).all()
        assert sampled.spread.max() > 0.01


@pytest.mark.parametrize("samples", [1, LANES, LANES + 1])
def test_at_rate_0_all_samples_are_the_plain_prediction(params, splits, samples):
    images = splits.test.images[:40]
    sampled = predict_mc(params, images, key=KEY, samples=samples, dropout_rate=0.0)
    np.testing.assert_allclose(sampled.probabilities, predict(params, images), atol=1e-6)
    np.testing.assert_allclose(sampled.spread, 0, atol=1e-7)
    np.testing.assert_allclose(sampled.mutual_information, 0, atol=1e-7)
    assert (sampled.mutual_information >= 0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": np.zeros((2, 28, 28), np.float32)}, TypeError, "must be uint8 pixels from 0 to 255, got float32"),
        ({"images": [[0]]}, TypeError, "must be uint8 pixels from 0 to 255, got list"),
        ({"images": np.zeros((28, 28), np.uint8)}, ValueError, r"\[n, 28, 28\] for this config, got \[28, 28\]"),
        ({"images": np.zeros((2, 14, 28), np.uint8)}, ValueError, r"\[n, 28, 28\] for this config, got \[2, 14, 28\]"),
        ({"config": TrainConfig(hidden=(256, 64))}, ValueError, "fc4.kernel is not part of the network"),
        ({"config": TrainConfig(hidden=(256, 128, 64, 32))}, ValueError, "fc5.kernel is missing"),
        ({"key": jax.random.PRNGKey(0)}, TypeError, "key must be one typed key"),
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"samples": 2.0}, TypeError, "samples must be an int, got 2.0"),
        ({"dropout_rate": 1.0}, ValueError, r"dropout_rate must lie in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_refused(params, unchecked, change, error, message):
    images = np.zeros((2, 28, 28), np.uint8)
    arguments = {"params": params, "images": images, "config": TrainConfig()} | change
    with pytest.raises(error, match=message):
        predict_mc(**MC | arguments)
    if not change.keys() & MC.keys():
        with pytest.raises(error, match=message):
            predict(**arguments)


def written(directory, picture, suffix=".png", **options) -> Path:
    path = directory / f"picture{suffix}"
    picture.save(path, **options)
    return path


def difference(image, original) -> float:
    return np.abs(image.astype(float) - original.astype(float)).mean()


def test_the_data_set_s_own_images_are_taken_as_they_are(tmp_path, splits):
    for image in splits.test.images[::20]:
        for pixels in (image, 255 - image):
            np.testing.assert_array_equal(read_image(written(tmp_path, Image.fromarray(pixels))), image)


def in_mode(mode):
    def convert(picture):
        return picture.convert(mode)

    return convert


@pytest.mark.parametrize(
    "convert",
    [
        *map(in_mode, ["RGB", "RGBA", "LA", "P"]),
        lambda picture: Image.fromarray(np.asarray(picture, np.uint16) * 257),
    ],
    ids=["RGB", "RGBA", "LA", "P", "16 bits"],
)
def test_every_mode_gives_the_same_image(tmp_path, splits, convert):
    original = splits.test.images[0]
    path = written(tmp_path, convert(Image.fromarray(original)))
    np.testing.assert_array_equal(read_image(path), original)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_exif_rotation_is_undone(tmp_path, splits, orientation, suffix):
    original = splits.test.images[0]
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = Image.fromarray(original).transpose(STORED[orientation])
    options = {"lossless": True} if suffix == ".webp" else {"quality": 95} if suffix == ".jpg" else {}
    image = read_image(written(tmp_path, stored, suffix, exif=exif, **options))
    assert difference(image, original) < (2 if suffix == ".jpg" else 1e-9)


@pytest.mark.parametrize(("dark", "alpha"), [(False, None), (True, None), (False, 1), (True, 1)])
def test_enlarged_and_padded_images_come_back(tmp_path, splits, dark, alpha):
    """Whole pixels are enlarged, so that their means are exact; what is left comes from extents below 28."""
    differences = []
    for original in splits.test.images[:50]:
        picture = Image.fromarray(255 - original if dark else original).resize((280, 280), Resampling.NEAREST)
        picture = ImageOps.expand(picture, (30, 5, 70, 111), 255 if dark else 0)
        if alpha is not None:
            picture = picture.convert("RGBA")
        differences.append(difference(read_image(written(tmp_path, picture)), original))
    assert np.median(differences) < 1e-9
    assert np.mean(differences) < 4


def test_the_longest_edge_becomes_28_and_the_rest_is_centred(tmp_path):
    paper = Image.new("L", (900, 700), 255)
    paper.paste(0, (300, 40, 500, 440))
    image = read_image(written(tmp_path, paper))
    expected = np.zeros((28, 28), np.uint8)
    expected[:, 7:21] = 255
    np.testing.assert_array_equal(image, expected)
    # The longest edge wide, and an odd margin: the wider side is above.
    paper = Image.new("L", (900, 700), 255)
    paper.paste(0, (100, 300, 660, 480))
    rows = np.flatnonzero(read_image(written(tmp_path, paper)).any(axis=1))
    assert (rows[0], rows[-1]) == (10, 18)


def test_a_grey_background_becomes_black(tmp_path):
    paper = Image.new("L", (300, 300), 200)
    paper.paste(0, (50, 50, 250, 150))
    paper.paste(100, (100, 80, 200, 120))
    image = read_image(written(tmp_path, paper))
    assert sorted(np.unique(image[12:16])) == [127, 128, 255] or set(np.unique(image[12:16])) <= {127, 128, 255}
    assert (image[:7] == 0).all()


@pytest.mark.parametrize("shade", [20, 235])
def test_a_cut_out_is_light_on_black_whatever_its_shade(tmp_path, shade):
    picture = Image.new("LA", (100, 100), (77, 0))
    picture.paste((shade, 255), (20, 0, 80, 100))
    image = read_image(written(tmp_path, picture))
    assert (image[:, 8:20] == 235).all()
    assert (image[:, :5] == 0).all()


def test_the_border_s_verdict_can_be_overridden(tmp_path):
    picture = Image.new("L", (28, 28), 200)
    picture.paste(250, (5, 5, 20, 20))
    path = written(tmp_path, picture)
    np.testing.assert_array_equal(read_image(path, light_on_dark=True), np.asarray(picture))
    np.testing.assert_array_equal(read_image(path, light_on_dark=False), 255 - np.asarray(picture))
    np.testing.assert_array_equal(read_image(path), 255 - np.asarray(picture))


def test_all_four_sides_tell_the_background(tmp_path):
    """An object along the whole left side; the right one is paper."""
    paper = Image.new("L", (10, 100), 255)
    paper.paste(0, (0, 0, 4, 100))
    image = read_image(written(tmp_path, paper))
    assert np.flatnonzero(image.any(axis=0)).tolist() == [14]
    assert (image[:, 14] == 255).all()


def test_what_is_within_5_percent_of_the_background_is_trimmed(tmp_path):
    paper = Image.new("L", (100, 100), 255)
    paper.paste(245, (10, 10, 90, 90))
    paper.paste(0, (40, 30, 60, 70))
    image = read_image(written(tmp_path, paper))
    assert np.flatnonzero(image.any(axis=1)).tolist() == list(range(28))
    assert np.flatnonzero(image.any(axis=0)).tolist() == list(range(7, 21))


def test_the_object_s_verdict_on_a_cut_out_can_be_overridden(tmp_path):
    picture = Image.new("LA", (28, 28), (77, 0))
    picture.paste((235, 255), (5, 5, 20, 20))
    path = written(tmp_path, picture)
    assert set(np.unique(read_image(path))) == {0, 235}
    assert set(np.unique(read_image(path, light_on_dark=False))) == {0, 20}


def test_half_transparent_pixels_show_half_of_the_background(tmp_path):
    picture = Image.new("LA", (28, 28), (0, 255))
    picture.paste((200, 128), (5, 5, 20, 20))
    assert set(np.unique(read_image(written(tmp_path, picture)))) == {0, 100}


def test_sound_pictures_of_other_formats_are_refused(tmp_path, splits):
    path = written(tmp_path, Image.fromarray(splits.test.images[0]), ".gif")
    with pytest.raises(ValueError, match="is not a PNG, JPEG or WebP image"):
        read_image(path)


def test_cmyk_is_close(tmp_path, splits):
    original = splits.test.images[0]
    path = written(tmp_path, Image.fromarray(original).convert("CMYK"), ".jpg", quality=95)
    assert difference(read_image(path), original) < 4


def png(width: int, height: int) -> bytes:
    """A valid beginning of a PNG file of any size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello", "is not a PNG, JPEG or WebP image"),
        (b"GIF89a" + bytes(100), "is not a PNG, JPEG or WebP image"),
        (png(100_000, 100_000), f"too large.*{MAX_PIXELS:,}"),
        (png(MAX_PIXELS // 1000, 1001), f"too large.*{MAX_PIXELS:,}"),
        (png(0, 5), "has no pixels|is not a PNG|is damaged"),
        (png(50, 50), "is damaged|one shade"),
    ],
    ids=["empty", "text", "another format", "bomb", "too large", "no width", "no rows"],
)
def test_what_is_no_image_is_refused(tmp_path, content, message):
    path = tmp_path / "file.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_image(path)
    assert str(path) in str(caught.value)


def test_missing_files_and_blank_pictures_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        read_image(tmp_path / "no.png")
    for side in (1, 28, 100):
        with pytest.raises(ValueError, match="shows one shade only"):
            read_image(written(tmp_path, Image.new("L", (side, side), 130)))


@pytest.mark.parametrize("background", [200, 252, 255])
@pytest.mark.parametrize(("light_on_dark", "found", "other"), [(True, "lighter", "dark"), (False, "darker", "light")])
def test_an_object_on_the_wrong_side_of_its_background_is_refused(tmp_path, background, light_on_dark, found, other):
    picture = Image.new("L", (100, 100), background)
    picture.paste(20, (30, 30, 70, 70))
    path = written(tmp_path, picture if light_on_dark else ImageOps.invert(picture))
    message = rf"nothing that is {found} than its background.* light_on_dark={not light_on_dark} \(--objects {other}\)"
    with pytest.raises(ValueError, match=message):
        read_image(path, light_on_dark=light_on_dark)
    assert (read_image(path) == read_image(path, light_on_dark=not light_on_dark)).all()


def test_noise_on_one_shade_is_no_object(tmp_path):
    """Pixels that are far apart from each other, and none of them from the background."""
    noise = np.random.default_rng(0).normal(200, 3, (300, 400)).clip(190, 210).astype(np.uint8)
    with pytest.raises(ValueError, match="shows one shade only"):
        read_image(written(tmp_path, Image.fromarray(noise)))


def test_a_transparent_shade_of_16_bits_is_that_of_8(tmp_path):
    levels = np.full((100, 100), 30, np.uint8)
    levels[20:80, 40:60] = 31
    twin = read_image(written(tmp_path, Image.fromarray(levels), transparency=30))
    path = written(tmp_path, Image.fromarray(levels * np.uint16(257)), transparency=30 * 257)
    np.testing.assert_array_equal(read_image(path), twin)
    assert twin.max() > 200


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_damaged_files_give_an_image_or_the_documented_error(tmp_path, splits, suffix):
    rng = np.random.default_rng(0)
    whole = written(tmp_path, Image.fromarray(splits.test.images[0]).resize((90, 90)), suffix).read_bytes()
    path = tmp_path / "damaged"
    refused = 0
    for trial in range(300):
        content = bytearray(whole[: rng.integers(1, len(whole))] if trial % 3 == 0 else whole)
        for position in rng.integers(0, len(content), 0 if trial % 3 == 0 else 4):
            content[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            assert read_image(path).shape == (28, 28)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
    assert refused > 100


def run_classify(*arguments):
    command = [sys.executable, str(CLASSIFY), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def table(stdout: str) -> list[list[str]]:
    rows = [line.strip("|").split("|") for line in stdout.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


@pytest.fixture(scope="module")
def kept(splits, tmp_path_factory):
    """Where the example keeps the network that it trains, and what it printed for a good and a bad file."""
    directory = tmp_path_factory.mktemp("classify")
    model, bad = directory / "new" / "network.safetensors", directory / "bad.png"
    bad.write_text("no image")
    good = written(directory, Image.fromarray(splits.test.images[0]))
    return model, run_classify(good, bad, "--model", model, "--output", directory / "out", "--epochs", 3)


@pytest.fixture(scope="module")
def model(kept):
    return kept[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "file/network.safetensors"), "no files can be written into this directory"),
        (("--output", "file/out"), "no files can be written into this directory"),
        (("--seed", 2**32), "--seed must lie between 0 and 2**32 - 1, got 4294967296"),
    ],
)
def test_what_cannot_be_written_is_told_before_training(tmp_path, splits, call, flags, message):
    (tmp_path / "file").touch()
    flag, value = flags
    image = written(tmp_path, Image.fromarray(splits.test.images[0]))
    place = value if flag == "--seed" else tmp_path / value
    output = ("--output", tmp_path / "out") * (flag != "--output")
    result = call(CLASSIFY, image, *output, flag, place, "--epochs", 1)
    assert result.returncode == 1
    assert message in result.stderr
    assert "epoch 1/" not in result.stderr


def test_twenty_files_keep_their_classes(tmp_path, splits, model):
    def enlarge(picture, scale):
        return picture.resize((28 * scale, 28 * scale), Resampling.BICUBIC)

    paths = []
    for i in range(20):
        picture = Image.fromarray(splits.test.images[i])
        way, options = i % 5, {}
        suffix = (".png", ".jpg", ".webp", ".jpg")[i % 4]
        if way == 0:
            picture = enlarge(picture, 7 + i)
        elif way == 1:
            picture = ImageOps.invert(enlarge(picture, 11))
        elif way == 2:
            picture = ImageOps.expand(enlarge(picture, 5), (40, 9, 3, 80), 0)
        elif way == 3:
            orientation = (3, 5, 6, 8)[i // 5]
            exif = Image.Exif()
            exif[0x112] = orientation
            picture, options = enlarge(picture, 9).transpose(STORED[orientation]), {"exif": exif}
        else:
            picture = ImageOps.expand(ImageOps.invert(enlarge(picture, 20)), (70, 50), 255).convert("RGB")
            suffix = ".jpg"
        paths.append(tmp_path / f"{i:02} größe{suffix}")
        picture.save(paths[-1], **options)
    result = run_classify(*paths, "--model", model, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    rows = table(result.stdout)
    assert [row[0] for row in rows] == list(map(str, paths))
    originals = [
        CLASS_NAMES[best] for best in predict(load_safetensors(model).params, splits.test.images[:20]).argmax(axis=1)
    ]
    assert sum(row[1] == original for row, original in zip(rows, originals, strict=True)) >= 18
    pictures = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in pictures] == [f"{i + 1:02}-{path.stem}.png" for i, path in enumerate(paths)]
    assert Image.open(io.BytesIO(pictures[0].read_bytes())).size[0] > 500


def test_classify_trains_and_keeps_a_network(splits, kept):
    model, result = kept
    assert result.returncode == 1
    assert "bad.png is not a PNG, JPEG or WebP image" in result.stderr
    assert "epoch 3/3" in result.stderr
    assert all(line.startswith("|") for line in result.stdout.splitlines())
    trained, pictures = result.stderr.splitlines()[-2:]
    assert trained.endswith(f"the network is in {model}")
    assert pictures == f"pictures are in {model.parents[1] / 'out'}"
    network = load_safetensors(model)
    assert network.class_names == CLASS_NAMES
    assert network.dropout_rate == 0.2
    best = predict(network.params, splits.test.images[:1])[0]
    assert table(result.stdout)[0][1:3] == [CLASS_NAMES[best.argmax()], f"{best.max():.3f}"]


def test_classify_tells_how_sure_it_is(tmp_path, splits, params):
    picture, model = written(tmp_path, Image.fromarray(splits.test.images[0])), tmp_path / "network.safetensors"
    save_safetensors(model, params, dropout_rate=0.5)
    result = run_classify(picture, "--model", model, "--samples", 50, "--output", tmp_path / "out")
    assert result.returncode == 0
    assert "epoch" not in result.stderr
    assert f"using the network in {model}\n" in result.stderr
    sampled = predict_mc(params, splits.test.images[:1], key=jax.random.key(0), samples=50, dropout_rate=0.5)
    best = sampled.probabilities[0].argmax()
    row = table(result.stdout)[0]
    assert row[2] == f"{sampled.probabilities[0, best]:.3f} ± {sampled.spread[0, best]:.3f}"
    assert row[-1] == f"{sampled.mutual_information[0]:.3f}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("no.png",), "no.png"),
        (("picture.png", "--model", "picture.png"), "is not a safetensors file"),
        (("picture.png", "--rate", 1.5), "--rate must lie in [0, 1), got 1.5"),
        (("picture.png", "--rate", 0.5), "was trained with the dropout rate 0.2, and --rate is 0.5; leave --rate out"),
    ],
)
def test_classify_refuses_bad_flags(tmp_path, splits, model, call, flags, message):
    written(tmp_path, Image.fromarray(splits.test.images[0]))
    flags = [tmp_path / flag if str(flag).endswith(".png") else flag for flag in flags]
    flags += [] if "--model" in flags else ["--model", model]
    result = call(CLASSIFY, *flags, "--output", tmp_path / "out")
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_classify_asks_for_a_rate_that_the_network_does_not_tell(tmp_path, splits, params, capsys):
    model, picture = tmp_path / "network.safetensors", written(tmp_path, Image.fromarray(splits.test.images[0]))
    save_safetensors(model, params)
    classify = runpy.run_path(str(CLASSIFY))
    flags = {"images": (picture,), "model": model, "output": tmp_path / "out"}
    with pytest.raises(ValueError, match=r"network\.safetensors does not tell which dropout rate .* --rate"):
        classify["main"](classify["Flags"](**flags, samples=2))
    for more in ({}, {"samples": 2, "rate": 0.3}):
        assert classify["main"](classify["Flags"](**flags, **more)) == 0
        assert CLASS_NAMES[9] in capsys.readouterr().out


@pytest.mark.parametrize("stem", ["n" * 245, "ß" * 120])
def test_classify_takes_names_as_long_as_names_may_be(tmp_path, splits, model, capsys, stem):
    picture = tmp_path / f"{stem}.png"
    Image.fromarray(splits.test.images[0]).save(picture)
    classify = runpy.run_path(str(CLASSIFY))
    assert classify["main"](classify["Flags"](images=(picture,), model=model, output=tmp_path / "out")) == 0
    assert table(capsys.readouterr().out)[0][0] == str(picture)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"01-{stem[:50]}.png"]
