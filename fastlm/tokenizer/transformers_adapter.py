"""A tokenizer as transformers' `PreTrainedTokenizerFast`: padding, truncation, chat templates, `return_tensors`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fastlm.errors import FastlmError, TokenizerError
from fastlm.tokenizer.huggingface_format import to_document

if TYPE_CHECKING:
    from fastlm.tokenizer.tokenizer import Tokenizer

# Where splitting, normalizing, spaces and bytes differ if anything does.
_PROBE = "The quick fox, 나는 학교에 갔다!  It's 12345 e\u0301 ﬁ 👩‍👩‍👧\n\n\tdef f(x):\r\n return x  "


def as_transformers(tokenizer: Tokenizer) -> Any:
    """`tokenizer` as a `transformers.PreTrainedTokenizerFast`, which runs on Hugging Face's `tokenizers`.

    It is made from what `save` would write, with the roles (bos, eos, pad) and the chat template that the vocabulary's
    file names. Ids are compared on a text of many kinds before it is given out. Saving it with `save_pretrained` makes
    a directory that `AutoTokenizer` and `Tokenizer.from_huggingface` read.

    Raises:
        TokenizerError: the vocabulary has no form in `tokenizer.json`, or ids differ.
        FastlmError: transformers is not installed.
    """
    try:
        from tokenizers import Tokenizer as HuggingFaceTokenizer
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        raise FastlmError("as_transformers needs transformers: pip install transformers") from None
    backend = HuggingFaceTokenizer.from_str(json.dumps(to_document(tokenizer)))
    settings = tokenizer.settings
    id_to_content = {token.id: token.content for token in tokenizer.added_tokens}
    eos = None if tokenizer.eos_token_id is None else id_to_content[tokenizer.eos_token_id]
    roles = {
        "bos_token": settings.bos_token,
        "eos_token": eos,
        "pad_token": settings.pad_token,
        "unk_token": settings.unk_token,
    }
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=settings.chat_template,
        **{role: token for role, token in roles.items() if token in tokenizer.special_tokens},
    )
    probe = "".join([_PROBE, *list(tokenizer.special_tokens)[:4]])
    if found(probe, add_special_tokens=False)["input_ids"] != tokenizer.encode(probe, allowed_special="all"):
        raise TokenizerError(f"{tokenizer.name}: transformers encodes a test text with other ids; this is a defect")
    return found
