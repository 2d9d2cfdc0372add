"""WAV files with their recipe inside, and untrusted WAV files."""

import json
import wave
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest

from hydrarun.core.errors import RunError
from hydrarun.outputs.media import kinds, recipe_text, wav, waveform
from tests.helpers.stranger import NASTY, refusal

refused = partial(refusal, wav.read_wav)


def chirp(count: int = 3000, channels: int = 2) -> np.ndarray:
    """A rising tone; the second channel has half the level and inverted sign. Both ends of the int16 range occur."""
    time = np.arange(count)
    tone = np.sin(time * time / 4000)
    samples = np.round(np.stack([tone, -0.5 * tone], -1)[:, :channels] * 32767).astype(np.int16)
    samples[0], samples[1] = -32768, 32767
    return samples


SOUND = chirp()


def write(folder: Path, data: bytes | None = None, **text: str) -> Path:
    path = folder / "sound.wav"
    path.write_bytes(wav.encode_wav(SOUND, 44100, text) if data is None else data)
    return path


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "channels", "rate"), [(1, 1, 8000), (3000, 2, 44100), (2**16 + 5, 2, 48000), (7, 1, 4)]
)
def test_samples_come_back_to_the_bit(tmp_path, count, channels, rate):
    samples = chirp(count + 2, channels)[2:]
    path = write(tmp_path, wav.encode_wav(samples, rate, {"hydrarun": "{}"}))
    found, record = wav.read_wav(path)
    assert np.array_equal(found, samples)
    assert found.dtype == np.int16
    assert record == {}
    with wave.open(str(path)) as file:  # read with the standard library
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes()) == (
            channels,
            2,
            rate,
            count,
        )
        assert np.array_equal(np.frombuffer(file.readframes(count), "<i2").reshape(-1, channels), samples)


def test_texts_come_back_to_the_letter(tmp_path):
    path = write(tmp_path, parameters=NASTY, hydrarun=json.dumps({"prompt": NASTY}, ensure_ascii=False))
    assert wav.read_wav(path)[1] == {"prompt": NASTY}
    with av.open(str(path)) as container:
        assert container.metadata["ISBJ"] == NASTY
        assert json.loads(container.metadata["comment"]) == {"prompt": NASTY}


def test_no_text_is_no_recipe(tmp_path):
    assert wav.read_wav(write(tmp_path))[1] is None


def test_the_same_samples_are_the_same_bytes():
    assert wav.encode_wav(SOUND, 44100, {"hydrarun": "{}"}) == wav.encode_wav(SOUND, 44100, {"hydrarun": "{}"})


def test_more_than_two_channels_are_refused():
    with pytest.raises(RunError, match="one or two channels, not 3"):
        wav.encode_wav(np.zeros((4, 3), np.int16), 8000, {})


def test_a_text_that_could_not_be_read_again_is_not_written():
    with pytest.raises(ValueError, match="the 'hydrarun' text is larger than"):
        wav.encode_wav(SOUND, 8000, {"hydrarun": "x" * (recipe_text.MAX_TEXT_BYTES + 1)})


# --- untrusted files -------------------------------------------------------------------------------------------------


def test_files_that_are_none(tmp_path):
    assert refused(tmp_path / "none.wav") == "No such file or directory"
    assert refused(write(tmp_path, b"")) == "not a wav file, or damaged at its start"
    assert refused(write(tmp_path, b"RIFF\4\0\0\0WAVX")) == "not a wav file, or damaged at its start"
    assert refused(write(tmp_path, b"RIFF\4\0\0\0WAVE")).startswith("damaged wav file: ")


@pytest.mark.parametrize("left", [40, 1000, -1])
def test_a_file_that_is_cut_short(tmp_path, left):
    assert refused(write(tmp_path, wav.encode_wav(SOUND, 8000, {})[:left])) == "damaged wav file: cut short"


def test_samples_of_another_kind(tmp_path):
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(8000)
        file.writeframes(bytes(100))
    assert refused(path) == "refused, not a wav file of 16-bit PCM"


def test_a_comment_that_is_no_recipe(tmp_path):
    for text in ("[1]", "{", "12"):
        said = refused(write(tmp_path, wav.encode_wav(SOUND, 8000, {"hydrarun": text})))
        assert said.startswith("its comment tag is not a JSON object")


def test_more_samples_than_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(wav, "MAX_BYTES", 1000)
    assert refused(write(tmp_path)) == "refused, more than 1000 bytes of samples"


# --- kind and waveform -----------------------------------------------------------------------------------------------


def test_silence_is_no_sound():
    assert kinds.find_array_kind(SOUND) is kinds.SOUND
    assert kinds.SOUND.monotone(SOUND) is None
    flat = np.full((100, 2), [300, -5], np.int16)
    flat[3, 1] += 1  # one level of rounding noise
    assert kinds.SOUND.monotone(flat) == "silence"
    flat[3, 1] += 1
    assert kinds.SOUND.monotone(flat) is None


def test_the_waveform_shows_every_sample():
    samples = np.zeros((5120, 2), np.int16)
    samples[1005, 0], samples[1006, 0] = 32767, -32768
    drawn = waveform.draw_waveform(samples)
    assert drawn.shape == (2 * waveform.HEIGHT, waveform.WIDTH, 3)
    inked = (drawn == waveform.INK).all(-1)
    first, second = inked[: waveform.HEIGHT], inked[waveform.HEIGHT :]
    assert first.sum(0).tolist() == [waveform.HEIGHT if column == 100 else 1 for column in range(512)]
    assert second.sum(0).tolist() == [1] * 512


def test_a_short_sound_is_as_wide():
    assert waveform.draw_waveform(chirp(3, 1)).shape == (waveform.HEIGHT, waveform.WIDTH, 3)
