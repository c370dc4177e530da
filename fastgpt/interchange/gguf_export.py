def limit(config, tokenizer):
    return None


def write(*_):
    raise NotImplementedError
