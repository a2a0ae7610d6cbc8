package org.gemmaedge.app

import android.content.ContentResolver
import android.net.Uri
import android.provider.DocumentsContract
import android.provider.DocumentsContract.Document
import java.io.IOException
import java.io.InputStream
import org.gemmaedge.app.model.BundleSource
import org.gemmaedge.app.model.ChosenFiles

/** What the user chose in the system's file picker. */
class Documents(private val resolver: ContentResolver) {
    /** The files of the folder [tree], and of its folders, one deep. */
    fun folder(tree: Uri): BundleSource {
        val root = DocumentsContract.getTreeDocumentId(tree)
        val files = HashMap<String, () -> InputStream>()
        for (entry in children(tree, root)) {
            if (entry.isFolder) {
                for (inner in children(tree, entry.id)) files["${entry.name}/${inner.name}"] = { read(inner.uri(tree)) }
            } else {
                files[entry.name] = { read(entry.uri(tree)) }
            }
        }
        return ChosenFiles(name(DocumentsContract.buildDocumentUriUsingTree(tree, root)), files)
    }

    /** Files that were chosen one by one, without their folders. */
    fun files(chosen: List<Uri>): BundleSource = ChosenFiles("imported", chosen.associate { uri -> name(uri) to { read(uri) } })

    fun read(uri: Uri): InputStream = try {
        resolver.openInputStream(uri) ?: throw IOException("the file cannot be opened")
    } catch (_: SecurityException) { // what was granted ends with the activity that asked
        throw IOException("the app may not read the file any more")
    }

    private class Entry(val id: String, val name: String, val isFolder: Boolean) {
        fun uri(tree: Uri): Uri = DocumentsContract.buildDocumentUriUsingTree(tree, id)
    }

    private fun children(tree: Uri, folder: String): List<Entry> {
        val uri = DocumentsContract.buildChildDocumentsUriUsingTree(tree, folder)
        val columns = arrayOf(Document.COLUMN_DOCUMENT_ID, Document.COLUMN_DISPLAY_NAME, Document.COLUMN_MIME_TYPE)
        val cursor = resolver.query(uri, columns, null, null, null) ?: throw IOException("the folder cannot be listed")
        return cursor.use {
            generateSequence { if (it.moveToNext()) it else null }
                .map { row -> Entry(row.getString(0), row.getString(1).orEmpty(), row.getString(2) == Document.MIME_TYPE_DIR) }
                .toList()
        }
    }

    private fun name(uri: Uri): String =
        resolver.query(uri, arrayOf(Document.COLUMN_DISPLAY_NAME), null, null, null)?.use { cursor ->
            if (cursor.moveToFirst()) cursor.getString(0) else null
        } ?: throw IOException("a chosen file has no name")
}
