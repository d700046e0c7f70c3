"""stub"""


class C:
    def release(self):
        pass


class Claims:
    def __init__(self, store, run):
        pass

    def take(self, r, s):
        return C()

    def holder(self, r, s):
        return ""
