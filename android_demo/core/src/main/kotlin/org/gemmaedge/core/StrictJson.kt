package org.gemmaedge.core

import kotlinx.serialization.json.Json

private const val DEEPEST = 64

/**
 * Refuses a JSON text that is nested deeply, or has an object with the same key twice: readers take one or the other.
 *
 * It checks no more than that; kotlinx.serialization checks the rest, and may throw already here. Throws [BadInput].
 */
internal fun checkJson(text: String) {
    val open = ArrayList<HashSet<String>?>() // the keys of each object that is open, null for an array
    var at = 0
    while (at < text.length) {
        when (text[at]) {
            '{' -> open.add(HashSet())
            '[' -> open.add(null)
            '}', ']' -> open.removeLastOrNull()
            '"' -> {
                val end = endOfString(text, at)
                val next = (end + 1 until text.length).firstOrNull { !text[it].isWhitespace() }
                val quoted = text.substring(at, end + 1)
                val isKey = next != null && text[next] == ':'
                if (isKey && open.lastOrNull()?.add(key(quoted)) == false) {
                    throw BadInput("the JSON has the key ${quoted.take(60)} twice; get the file again")
                }
                at = end
            }
        }
        if (open.size > DEEPEST) throw BadInput("the JSON is nested too deeply; get the file again")
        at++
    }
}

private fun endOfString(text: String, start: Int): Int {
    var at = start + 1
    while (at < text.length && text[at] != '"') at += if (text[at] == '\\') 2 else 1
    return minOf(at, text.length - 1)
}

/** The key that [quoted] spells, perhaps with escapes. */
private fun key(quoted: String): String =
    if ('\\' in quoted) Json.decodeFromString(quoted) else quoted.substring(1, quoted.length - 1)
