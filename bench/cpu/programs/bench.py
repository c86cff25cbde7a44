# Dictionaries, strings, and queens on a board of 7 by 7.
words = {}
for i in range(60000):
    word = "w%d" % (i * 7919 % 5003)
    words[word] = words.get(word, 0) + i
total = sum(len(word) * count for word, count in sorted(words.items()))


def queens(n, row=0, columns=0, left=0, right=0):
    if row == n:
        return 1
    count = 0
    for column in range(n):
        bit = 1 << column
        if not (columns & bit or left & bit or right & bit):
            count += queens(n, row + 1, columns | bit, (left | bit) << 1, (right | bit) >> 1)
    return count


class Point:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def moved(self, other):
        return Point(self.x + other.x, self.y - other.y)


point = Point(0.0, 0.0)
for i in range(20000):
    point = point.moved(Point(i, 0.5))
assert (total, queens(7), point.y) == (8600587695, 40, -10000.0), (total, queens(7), point.y)
