"""fastlm's ops under the names that other libraries give them, and inside the models of other libraries.

`fastlm.patch` puts them into a Hugging Face model; `flash_attn` has the functions of the package of that name.
"""
