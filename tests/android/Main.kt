import app.kindedge.KindEdge

/** Draws with a seed and a class, and prints the picture's values: what tests/deploy/test_kotlin.py compares. */
fun main(arguments: Array<String>) {
    val model = KindEdge.load(ByteArray(1))
    var told = 0
    val picture = model.generate(arguments[0], arguments[1].toLong(), 3, { done, all -> told += all - done })
    model.close()
    println(told)
    picture.forEach { println(it) }
}
