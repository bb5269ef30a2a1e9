"""What is kept of a conversation comes back whole, and no file makes reading it fail badly."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx.errors import SessionError
from minicpm_mlx.lm import session_cache, sessions
from minicpm_mlx.lm.fingerprint import fingerprint
from minicpm_mlx.lm.outputs import collect

GREEDY = mm.Sampling(temperature=0)
TURNS = [
    {"role": "user", "content": '山东省最高的山是哪座山？ 🐟\n"two"\tlines \\n \x00 \u2028'},
    {"role": "assistant", "content": "泰山。\n\n```python\nprint('🐈‍⬛')\n```\n"},
    {"role": "user", "content": " whole: \ufffd, after a \\\ufffd "},
    {"role": "assistant", "content": "?"},
]


@pytest.fixture(autouse=True)
def folder(demo: mm.LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty sessions folder, that `save` makes."""
    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path / "home"))
    return sessions.directory()


def new_chat(lm: mm.LM, **options: Any) -> mm.Chat:
    return mm.Chat(lm, **{"messages": [dict(m) for m in TURNS], "sampling": GREEDY} | options)


def sound(lm: mm.LM) -> dict[str, Any]:
    """The JSON of a saved session."""
    path = sessions.save(new_chat(lm, system="Be brief.", forgotten=2), "sound")
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return raw


def put(folder: Path, name: str, content: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


# There and back


def test_session_comes_back_as_it_was(demo: mm.LM, folder: Path) -> None:
    filters: Any = {"top_p": 0.9, "top_k": 40, "min_p": 0.05, "logit_bias": {5: -1.5}}
    sampling = mm.Sampling(temperature=0.7, seed=2**64 - 1, **filters)
    limits: Any = {"max_tokens": 33, "context": 500, "kv_bits": 8, "forgotten": 2}
    texts: Any = {"system": "Sei “kurz”.\n", "stop": ("\n\n", "停"), "on_overflow": "slide"}
    chat = new_chat(demo, sampling=sampling, **limits, **texts)
    path = sessions.save(chat, "Ein Test")
    assert path == folder / "Ein Test.json"
    saved = sessions.load("Ein Test")
    assert (saved.name, saved.model, saved.identity) == ("Ein Test", "demo", fingerprint(demo))
    assert saved.title == "山东省最高的山是哪座山？ 🐟"
    back = sessions.restore(saved, demo)
    for name in ("system", "messages", "forgotten", "sampling", "max_tokens", "context"):
        assert getattr(back, name) == getattr(chat, name), name
    assert (back.kv_bits, back.on_overflow, list(back.stop)) == (8, "slide", ["\n\n", "停"])
    again = sessions.save(back, "again").read_text(encoding="utf-8")
    assert again.splitlines()[5:] == path.read_text(encoding="utf-8").splitlines()[5:]
    back.messages[0]["content"] = "other"
    assert saved.messages == TURNS


def test_file_can_be_read_by_people(demo: mm.LM) -> None:
    text = sessions.save(new_chat(demo), "a").read_text(encoding="utf-8")
    assert "山东省最高的山是哪座山？ 🐟" in text
    assert text.startswith('{\n  "name": "a",\n  "model": "demo",\n')
    assert text.endswith("}\n")
    assert sessions.path_of("a").stat().st_mode & 0o077 == 0  # and by no other person


def test_chat_without_sampling_of_its_own_keeps_the_models(demo: mm.LM) -> None:
    sessions.save(new_chat(demo, sampling=None), "a")
    assert sessions.restore(sessions.load("a"), demo).sampling == demo.sampling


def test_given_settings_replace_the_saved_ones_and_none_does_not(demo: mm.LM) -> None:
    sessions.save(new_chat(demo, max_tokens=5, system="Be brief."), "a")
    saved = sessions.load("a")
    chat = sessions.restore(saved, demo, max_tokens=7, seed=3, kv_bits=None, temperature=None)
    assert (chat.max_tokens, chat.sampling, chat.kv_bits) == (7, mm.Sampling(seed=3), None)
    assert chat.system == "Be brief."
    with pytest.raises(SessionError, match="kv_bits must be 8 or 4, got 5"):
        sessions.restore(saved, demo, kv_bits=5)


def test_model_is_named_as_it_can_be_loaded_again(demo: mm.LM, tmp_path: Path) -> None:
    def name(**card: Any) -> str:
        lm = replace(demo, card=mm.Card(**card))
        sessions.save(new_chat(lm), "a")
        return sessions.load("a").model

    assert name(name="x", path=tmp_path / "x") == str(tmp_path / "x")
    assert name(name="org/x", repo="org/x") == "org/x"
    assert name(name="org/x", repo="org/x", revision="v1/b") == "org/x@v1/b"
    assert name(name="my-card", repo="org/x", revision="v1") == "my-card"


def test_conversation_that_could_not_be_read_again_is_not_written(demo: mm.LM) -> None:
    path = sessions.save(new_chat(demo), "a")
    before = path.read_bytes()
    with pytest.raises(SessionError, match="not saved"):
        sessions.save(new_chat(demo, messages=[{"role": "robot", "content": "x"}]), "a")
    assert path.read_bytes() == before


# Names


BAD_NAMES = [
    "",
    "..",
    "../x",
    "/etc/passwd",
    "a\\b",
    ".hidden",
    " x",
    "x.",
    "x\n",
    "🐟",
    "x\ud800",
    "a" * 81,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_name_that_is_no_files_is_refused(demo: mm.LM, name: str) -> None:
    for use in (
        sessions.load,
        sessions.cache_path,
        lambda name: sessions.save(new_chat(demo), name),
    ):
        with pytest.raises(SessionError, match="a session's name is up to 80 letters") as error:
            use(name)
        assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["7", "v1.5 +x_y-z", "山东 2025", "a.json", "a" * 80, "山" * 80])
def test_other_names_work_for_session_and_cache(demo: mm.LM, name: str) -> None:
    sessions.save(new_chat(demo), name)
    session_cache.save_cache(new_chat(demo), name)
    assert [saved.name for saved in sessions.listed()] == [name]


def test_name_is_claimed_by_who_saves_first(demo: mm.LM, folder: Path) -> None:
    names = [sessions.save_new(new_chat(demo), "a") for _ in range(3)]
    assert names == ["a", "a-2", "a-3"]
    assert sorted(path.name for path in folder.iterdir()) == ["a-2.json", "a-3.json", "a.json"]
    assert sessions.save_new(new_chat(demo), "𠀀" * 60) == "𠀀" * 60
    assert sessions.save_new(new_chat(demo), "𠀀" * 60) == "𠀀" * 50 + "-2"


def test_claim_that_comes_to_nothing_leaves_no_file(
    demo: mm.LM, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "write_text", failing(OSError(errno.ENOSPC, "full")))
    with pytest.raises(SessionError, match="full"):
        sessions.save_new(new_chat(demo), "a")
    assert list(folder.iterdir()) == []


def test_version_changes_with_each_save(demo: mm.LM) -> None:
    assert sessions.version("a") is None
    seen = set()
    for _ in range(5):
        sessions.save(new_chat(demo), "a")
        seen.add(sessions.version("a"))
    assert len(seen) == 5
    assert sessions.load("a").version == sessions.version("a")
    session_cache.save_cache(new_chat(demo), "a")
    assert sessions.version("a") in seen
    sessions.remove("a")
    sessions.remove("a")
    assert sessions.version("a") is None
    assert not sessions.cache_path("a").exists()


def test_new_name_is_no_sessions(demo: mm.LM) -> None:
    names = [
        sessions.new_name() for _ in range(3) if sessions.save(new_chat(demo), sessions.new_name())
    ]
    assert len(set(names)) == 3
    assert not set(names[-1:]) & {saved.name for saved in sessions.listed()}


# Writing


def failing(error: BaseException) -> Callable[..., None]:
    def write_text(path: Path, text: str, **_: Any) -> None:
        path.write_bytes(text.encode(errors="replace")[: len(text) // 2])
        raise error

    return write_text


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SessionError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("earlier", [True, False])
def test_write_that_fails_half_way_leaves_what_was_there(
    demo: mm.LM,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
    earlier: bool,
) -> None:
    before = {}
    if earlier:
        path = sessions.save(new_chat(demo), "a")
        before = {path: path.read_bytes()}
    chat = new_chat(demo, messages=TURNS[:2])
    monkeypatch.setattr(Path, "write_text", failing(error))
    with pytest.raises(raised) as caught:
        sessions.save(chat, "a")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    if raised is SessionError:
        assert "No space left on device" in str(caught.value)


def test_cache_that_does_not_fit_on_the_disk_leaves_the_earlier_one(
    demo: mm.LM, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: str, *_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("[write] Unable to write 5 bytes to file.")

    path = session_cache.save_cache(new_chat(demo), "a")
    before = path.read_bytes()
    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(SessionError, match="Unable to write"):
        session_cache.save_cache(new_chat(demo), "a")
    assert [file.read_bytes() for file in folder.iterdir()] == [before]


def test_folder_that_cannot_be_made_is_one_line(demo: mm.LM, folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("a file")
    with pytest.raises(SessionError, match="could not be saved"):
        sessions.save(new_chat(demo), "a")
    for use in (sessions.listed, lambda: sessions.load("a")):
        with pytest.raises(SessionError, match="cannot be read"):
            use()


def test_session_of_a_model_whose_folder_is_gone_is_saved(demo: mm.LM, tmp_path: Path) -> None:
    gone = replace(demo, folder=tmp_path / "gone")
    sessions.save(new_chat(gone), "a")
    assert sessions.load("a").identity != fingerprint(demo)


BOTH = """
import sys
from types import SimpleNamespace as N
from minicpm_mlx import Sampling
from minicpm_mlx.lm import sessions
sessions.fingerprint = lambda lm: "x"
text = sys.argv[1] * int(sys.argv[2])
lm = N(card=N(path=None, name="demo", repo=None), adapter=None)
chat = N(lm=lm, sampling=Sampling(), system=None,
    messages=[{"role": "user", "content": text}], forgotten=0,
    max_tokens=None, stop=[], context=None, kv_bits=None, on_overflow="stop",
    think=None, think_tokens=None, max_rounds=10)
for _ in range(100):
    sessions.save(chat, "both")
"""


def test_two_processes_that_save_at_once_leave_a_sound_file(demo: mm.LM, folder: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", BOTH, letter, str(size)])
        for letter, size in (("a", 200_000), ("b", 50_000))
    ]
    seen = set()
    end = time.monotonic() + 60
    while any(writer.poll() is None for writer in writers) and time.monotonic() < end:
        if sessions.path_of("both").exists():
            (message,) = sessions.load("both").messages
            seen.add((message["content"][0], len(message["content"])))
    assert [writer.wait(10) for writer in writers] == [0, 0]
    assert seen <= {("a", 200_000), ("b", 50_000)}
    assert [path.name for path in folder.iterdir()] == ["both.json"]


# Reading what may be anything


def refused(name: str, message: str) -> None:
    """Loading says `message` in one line, and leaves the file."""
    path = sessions.path_of(name)
    before = path.read_bytes()
    with pytest.raises(SessionError, match=message) as error:
        sessions.load(name)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600
    assert path.read_bytes() == before


def test_missing_session_is_named_with_the_nearest(demo: mm.LM) -> None:
    with pytest.raises(SessionError, match=r"no session 'nothing' in .*sessions$"):
        sessions.load("nothing")
    for name in ("recipes", "garden", "travel", "things"):
        sessions.save(new_chat(demo), name)
    with pytest.raises(SessionError, match="; the nearest are 'recipes'"):
        sessions.load("recipe")
    with pytest.raises(SessionError, match="; the nearest are 'things'"):
        sessions.load("nothing")


def test_half_a_surrogate_pair_is_replaced(demo: mm.LM, folder: Path) -> None:
    raw = sound(demo) | {"system": "\ud83d\udc1f \udc1f"}
    raw["messages"][0]["content"] = "a \ud83d b"
    path = put(folder, "half", "")
    path.write_text(json.dumps(raw))  # as JSON's own escapes
    saved = sessions.load("half")
    assert (saved.title, saved.system) == ("a \ufffd b", "🐟 \ufffd")
    assert saved.messages[1:] == TURNS[1:]


def test_unanswered_question_is_taken_out(demo: mm.LM) -> None:
    raw = sound(demo)
    raw["messages"].append({"role": "user", "content": "And?"})
    saved = sessions.SavedSession(**raw | {"forgotten": 5})
    assert saved.take_unanswered() == "And?"
    assert (saved.messages, saved.forgotten) == (TURNS, 4)
    assert saved.take_unanswered() == ""


def test_truncated_file_is_refused_wherever_it_ends(demo: mm.LM, folder: Path) -> None:
    whole = sessions.save(new_chat(demo), "whole").read_bytes()
    path = put(folder, "cut", "")
    for end in range(0, len(whole) - 2, 41):
        path.write_bytes(whole[:end])
        refused("cut", "cannot be read|no saved session")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "NaN"),
        ("temperature", "9" * 4000),
        ("seed", "-1"),
        ("max_tokens", '"5"'),
        ("context", "1.5"),
        ("kv_bits", "true"),
        ("on_overflow", "[" * 900 + "]" * 900),
        ("stop", '{"a": "b"}'),
    ],
)
def test_setting_out_of_range_is_one_line(demo: mm.LM, folder: Path, key: str, value: str) -> None:
    raw = sound(demo)
    raw["settings"][key] = "HERE"
    path = put(folder, "odd", json.dumps(raw).replace('"HERE"', value))
    before = path.read_bytes()
    with pytest.raises(SessionError, match=key) as error:
        sessions.restore(sessions.load("odd"), demo)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"messages": ' + b"9" * 5000,
        b"\xef\xbb\xbf{}",
    ],
)
def test_file_of_another_kind_is_refused(folder: Path, content: bytes) -> None:
    put(folder, "strange", "").write_bytes(content)
    refused("strange", "cannot be read")


@pytest.mark.parametrize("content", [[1], 5, None, {}, {"messages": []}])
def test_other_json_is_no_session(folder: Path, content: object) -> None:
    put(folder, "other", content)
    refused("other", "this is no saved session; it was left as it is")


NESTED = json.loads("[" * 900 + "]" * 900)
BAD_FIELDS: dict[str, list[Any]] = {
    "format": [2, "1", None, 10**4000, "x" * 10**6, NESTED],
    "model": [None],
    "identity": [5],
    "system": [5],
    "settings": [None, NESTED],
    "messages": [["x"], [{"role": "user"}], [{"role": ["user"], "content": "x"}], NESTED],
    "forgotten": [5, True],
}


@pytest.mark.parametrize("key", BAD_FIELDS)
def test_field_of_a_wrong_type_is_refused(demo: mm.LM, folder: Path, key: str) -> None:
    for value in BAD_FIELDS[key]:
        put(folder, "bad", sound(demo) | {key: value})
        refused("bad", "another version" if key == "format" else "damaged")


def test_settings_that_are_absent_or_unknown_take_no_effect(demo: mm.LM, folder: Path) -> None:
    raw = sound(demo) | {"settings": {"colour": float("nan")}, "mood": [1]}
    raw["messages"][0]["tool_calls"] = [1]
    put(folder, "later", raw)
    chat = sessions.restore(sessions.load("later"), demo)
    assert (chat.sampling, chat.max_tokens, chat.on_overflow) == (GREEDY, None, "stop")
    assert chat.messages == TURNS


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**4000, -(10**400), 2**64, 2**63, 1, 8, 0, -1])
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.sampled_from(["user", "assistant", "stop", "slide", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    items: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value)
    return [path, *(found for key, inner in items for found in places(inner, (*path, key)))]


@pytest.fixture(scope="module")
def original(demo: mm.LM, home: Path) -> dict[str, Any]:
    return sound(demo)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_session_changed_at_random_is_restored_or_refused(
    demo: mm.LM, folder: Path, original: dict[str, Any], data: st.DataObject
) -> None:
    raw: Any = {"root": copy.deepcopy(original)}
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(places(raw)[1:]))
        holder = raw
        for key in way:
            holder = holder[key]
        if data.draw(st.booleans()) and last != "root":
            del holder[last]
        else:
            holder[last] = data.draw(JSON)
    path = put(folder, "wild", json.dumps(raw["root"]))
    before = path.read_bytes()
    chat, problem = None, ""
    try:
        chat = sessions.restore(sessions.load("wild"), demo)
    except SessionError as error:
        problem = str(error)
    assert problem.isprintable()
    assert path.read_bytes() == before
    if chat is not None:
        sessions.save(chat, "tame")
        again = sessions.restore(sessions.load("tame"), demo)
        assert (again.messages, again.sampling) == (chat.messages, chat.sampling)
        assert sessions.markdown("wild", "demo", chat.system, chat.messages)


# The list


def test_list_begins_with_the_last_saved_and_skips_what_is_broken(
    demo: mm.LM, folder: Path
) -> None:
    assert sessions.listed() == []
    for name in ("b", "a", "c", "山"):  # within one second
        sessions.save(new_chat(demo), name)
    sessions.save(new_chat(demo), "a")
    session_cache.save_cache(new_chat(demo), "a")
    for age, name in enumerate(("a", "山", "c", "b")):  # by the files' times, whatever they say
        os.utime(sessions.path_of(name), (1e9 - age, 1e9 - age))
    put(folder, "broken", "{")
    put(folder, "other", [1])
    put(folder, "_x", sound(demo))
    put(folder, ".partial", sound(demo))
    (folder / "dir.json").mkdir()
    sessions.path_of("sound").unlink()
    assert [saved.name for saved in sessions.listed()] == ["a", "山", "c", "b"]


def test_file_that_was_renamed_goes_by_its_new_name(demo: mm.LM) -> None:
    sessions.save(new_chat(demo), "old").rename(sessions.path_of("new"))
    assert sessions.load("new").name == "new"


def test_title_is_the_first_questions_first_line(demo: mm.LM) -> None:
    raw = sound(demo) | {"messages": [], "forgotten": 0}
    assert sessions.SavedSession(**raw).title == ""
    raw["messages"] = [
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "\n What?\nThat."},
    ]
    assert sessions.SavedSession(**raw).title == "What?"


def test_markdown_has_every_turn() -> None:
    assert sessions.markdown("Berge", "demo", "Be\nbrief.", TURNS[:2]) == (
        "# Berge\n\n*demo*\n\n> Be\n> brief.\n\n**You**\n\n"
        f"{TURNS[0]['content'].strip()}\n\n**demo**\n\n{TURNS[1]['content'].strip()}\n"
    )
    assert sessions.markdown("x", "demo", None, []) == "# x\n\n*demo*\n"


# The key-value cache


@pytest.fixture(scope="module")
def talk(demo: mm.LM, tmp_path_factory: pytest.TempPathFactory) -> dict[int | None, Path]:
    """A turn's cache, in full and in 8 and 4 bits."""
    paths = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINICPM_MLX_HOME", str(tmp_path_factory.mktemp("talk")))
        for bits in (None, 8, 4):
            chat = mm.Chat(demo, sampling=GREEDY, max_tokens=3, kv_bits=bits)
            collect(chat.reply("Two plus two?"))
            sessions.save(chat, f"talk{bits}")
            paths[bits] = session_cache.save_cache(chat, f"talk{bits}")
            collect(chat.reply("And three?"))
            WANTED[bits] = list(chat.messages)
    return paths


WANTED: dict[int | None, list[dict[str, str]]] = {}


def resumed(demo: mm.LM, talk: dict[int | None, Path], bits: int | None = None) -> mm.Chat:
    """The chat of `talk`, its cache put beside it as session "a"."""
    sessions.directory().mkdir(parents=True, exist_ok=True)
    shutil.copy(talk[bits].with_suffix(".json"), sessions.path_of("a"))
    shutil.copy(talk[bits], sessions.cache_path("a"))
    return sessions.restore(sessions.load("a"), demo)


def goes_on(chat: mm.Chat, cached: bool, bits: int | None = None) -> None:
    """The next turn is answered as ever, with the cache or without."""
    stats = collect(chat.reply("And three?")).stats
    assert chat.messages == WANTED[bits]
    assert (stats.cached_tokens > 0) is cached


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_cache_comes_back_and_the_next_turn_is_the_same(
    demo: mm.LM, talk: dict[int | None, Path], bits: int | None
) -> None:
    chat = resumed(demo, talk, bits)
    assert chat.kv_bits == bits
    assert session_cache.restore_cache(chat, "a") is None
    session_cache.save_cache(chat, "b")
    first, second = (mx.load(str(sessions.cache_path(name))) for name in "ab")
    assert first.keys() == second.keys()
    assert all(mx.array_equal(first[name], second[name]) for name in first)
    goes_on(chat, True, bits)


def test_cache_kept_after_a_step_was_broken_off_is_right(
    demo: mm.LM, talk: dict[int | None, Path]
) -> None:
    chat = resumed(demo, talk)
    assert session_cache.restore_cache(chat, "a") is None
    chat.session.cache[0].trim(-1)  # one layer had written a token more
    assert chat.session.cache[0].offset == len(chat.session.ids) + 1
    session_cache.save_cache(chat, "a")
    chat = sessions.restore(sessions.load("a"), demo)
    assert session_cache.restore_cache(chat, "a") is None
    goes_on(chat, True)


def test_cache_of_no_turn_does_no_harm(demo: mm.LM, talk: dict[int | None, Path]) -> None:
    chat = resumed(demo, talk)
    session_cache.save_cache(new_chat(demo), "a")
    session_cache.restore_cache(chat, "a")
    goes_on(chat, False)


def test_cache_of_another_conversation_is_used_as_far_as_it_is_the_same(
    demo: mm.LM, talk: dict[int | None, Path]
) -> None:
    chat = resumed(demo, talk)
    other = mm.Chat(demo, sampling=GREEDY, max_tokens=2)
    collect(other.reply("Why?"))
    session_cache.save_cache(other, "a")
    assert session_cache.restore_cache(chat, "a") is None
    goes_on(chat, True)


Tensors = dict[str, Any]


def changed(path: Path, change: Callable[[Tensors, dict[str, str]], object]) -> None:
    """Write the cache anew with other tensors or facts."""
    loaded: Any = mx.load(str(path), return_metadata=True)
    tensors, facts = dict(loaded[0]), dict(loaded[1])
    mx.eval(tensors)
    change(tensors, facts)
    mx.save_safetensors(str(path), tensors, facts)


DAMAGE: dict[str, Callable[[Tensors, dict[str, str]], object]] = {
    "layer missing": lambda t, _: [t.pop("29.0"), t.pop("29.1")],
    "part too many": lambda t, _: t.update({"0.2": t["0.0"]}),
    "wide": lambda t, _: t.update({"5.0": mx.concatenate([t["5.0"]] * 2, axis=-1)}),
    "narrow": lambda t, _: t.update({n: a[..., :1] for n, a in t.items() if n != "ids"}),
    "shorter": lambda t, _: t.update({"29.0": t["29.0"][:, :, 1:]}),
    "flat": lambda t, _: t.update({"0.0": t["0.0"].reshape(-1)}),
    "empty": lambda t, _: t.clear(),
    "whole numbers": lambda t, _: t.update(
        {n: a.astype(mx.int32) for n, a in t.items() if n != "ids"}
    ),
    "two number formats": lambda t, _: t.update({"7.1": t["7.1"].astype(mx.bfloat16)}),
    "no ids": lambda t, _: t.pop("ids"),
    "ids too few": lambda t, _: t.update(ids=t["ids"][:-1]),
    "ids in rows": lambda t, _: t.update(ids=t["ids"][None]),
    "ids floats": lambda t, _: t.update(ids=t["ids"].astype(mx.float32)),
    "no length": lambda _, facts: facts.pop("length"),
    "length a word": lambda _, facts: facts.update(length="long"),
    "other identity": lambda _, facts: facts.update(identity="0" * 32),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_left_aside_with_a_reason(
    demo: mm.LM, talk: dict[int | None, Path], damage: str
) -> None:
    chat = resumed(demo, talk)
    before = chat.session
    changed(sessions.cache_path("a"), DAMAGE[damage])
    reason = session_cache.restore_cache(chat, "a")
    assert reason
    assert reason.isprintable()
    assert chat.session is before
    assert (chat.session.ids, chat.session.cache[0].offset) == ([], 0)


def test_after_a_cache_was_left_aside_the_answer_is_right(
    demo: mm.LM, talk: dict[int | None, Path]
) -> None:
    chat = resumed(demo, talk)
    changed(sessions.cache_path("a"), DAMAGE["shorter"])  # the last layer: others were sound
    assert (
        session_cache.restore_cache(chat, "a") == "it was made with another kv_bits or is damaged"
    )
    goes_on(chat, False)


@pytest.mark.parametrize(("made", "wanted"), [(None, 8), (8, 4), (4, None)])
def test_cache_in_other_bits_is_left_aside(
    demo: mm.LM, talk: dict[int | None, Path], made: int | None, wanted: int | None
) -> None:
    chat = resumed(demo, talk, made)
    chat = replace(chat, kv_bits=wanted)
    reason = session_cache.restore_cache(chat, "a")
    assert reason == "it was made with another kv_bits or is damaged"
    assert chat.session.cache[0].bits == wanted


def test_truncated_cache_is_left_aside(demo: mm.LM, talk: dict[int | None, Path]) -> None:
    chat = resumed(demo, talk)
    path = sessions.cache_path("a")
    whole = path.read_bytes()
    for end in (0, 1, 7, 8, 100, 4000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        reason = session_cache.restore_cache(chat, "a")
        assert reason is not None
        assert reason == f"{path}: damaged (WeightsError)"
    path.unlink()
    assert session_cache.restore_cache(chat, "a") == "no cache was kept"
    path.mkdir()
    assert session_cache.restore_cache(chat, "a") is not None
    goes_on(chat, False)


def test_cache_of_another_model_is_left_aside(
    demo: mm.LM, talk: dict[int | None, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = resumed(demo, talk)
    monkeypatch.setattr(session_cache, "fingerprint", lambda lm: "another")
    reason = "weights, adapter, tokenizer or template are others than those it was made with"
    assert session_cache.restore_cache(chat, "a") == reason
    goes_on(chat, False)


def test_kept_caches_have_a_bound_and_the_one_used_longest_ago_goes(
    demo: mm.LM, folder: Path, talk: dict[int | None, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir(parents=True)
    size = talk[None].stat().st_size
    for age, name in enumerate(("newer", "older", "oldest"), start=1):
        sessions.save(new_chat(demo), name)
        path = shutil.copy(talk[None], sessions.cache_path(name))
        os.utime(path, (1_700_000_000 - age, 1_700_000_000 - age))
    killed = folder / ".killed.safetensors"  # while it was being written
    killed.touch()
    os.utime(killed, (1, 1))
    assert session_cache.restore_cache(new_chat(demo), "oldest") is None  # it is used now
    chat = new_chat(demo)
    chat.session = demo.session()
    list(chat.reply("Go on."))
    path = session_cache.save_cache(chat, "now")
    assert path is not None
    limit = 2 * size + path.stat().st_size + 2**16
    path.unlink()
    monkeypatch.setattr(sessions, "CACHE_LIMIT", limit)
    session_cache.save_cache(chat, "now")
    assert {path.stem for path in sessions.cache_sizes()} == {"newer", "oldest", "now"}
    assert sum(sessions.cache_sizes().values()) <= limit
    assert len(sessions.listed()) == 3  # conversations stay
    monkeypatch.setattr(sessions, "CACHE_LIMIT", 1000)
    assert session_cache.save_cache(chat, "new") is None
    assert not sessions.cache_path("new").exists()
    assert sessions.cache_sizes()


def test_thoughts_and_how_to_think_are_saved(demo: mm.LM) -> None:
    reply = {"role": "assistant", "content": "Four.", "reasoning_content": "Two\nand two."}
    messages = [TURNS[0], reply]
    sessions.save(new_chat(demo, messages=messages, think=False, think_tokens=9), "a")
    saved = sessions.load("a")
    chat = sessions.restore(saved, demo)
    assert (chat.messages, chat.think, chat.think_tokens) == (messages, False, 9)
    assert chat.thoughts() == [["Two\nand two."]]
    assert "and two" not in saved.to_markdown("a")
    assert "> *thought*\n> \n> Two\n> and two.\n\nFour." in saved.to_markdown("a", thoughts=True)
    path = sessions.path_of("a")
    raw = json.loads(path.read_text())
    for damage in (
        {"messages": [TURNS[0], reply | {"reasoning_content": 3}]},
        {"settings": raw["settings"] | {"think": "yes"}},
        {"settings": raw["settings"] | {"think_tokens": -1}},
    ):
        path.write_text(json.dumps(raw | damage))
        with pytest.raises(SessionError):
            sessions.restore(sessions.load("a"), demo)
