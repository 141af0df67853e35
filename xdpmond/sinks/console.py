class ConsoleSink:
    name="console"; lost=0; held_back=0
    def __init__(self, verbose=False): pass
    def put(self, r): print(r.message.name, r.text, flush=True)
    def set_budget(self, n): pass
    def close(self): pass
