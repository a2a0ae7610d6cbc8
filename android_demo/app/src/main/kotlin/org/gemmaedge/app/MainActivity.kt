package org.gemmaedge.app

import android.content.Intent
import android.net.Uri
import android.os.Bundle
import androidx.activity.ComponentActivity
import androidx.activity.compose.BackHandler
import androidx.activity.compose.setContent
import androidx.activity.enableEdgeToEdge
import androidx.activity.result.PickVisualMediaRequest
import androidx.activity.result.contract.ActivityResultContracts.OpenDocumentTree
import androidx.activity.result.contract.ActivityResultContracts.OpenMultipleDocuments
import androidx.activity.result.contract.ActivityResultContracts.PickVisualMedia
import androidx.compose.runtime.Composable
import androidx.compose.runtime.DisposableEffect
import androidx.compose.runtime.collectAsState
import androidx.compose.runtime.getValue
import androidx.compose.runtime.remember
import androidx.compose.ui.graphics.ImageBitmap
import androidx.compose.ui.platform.LocalView
import org.gemmaedge.app.model.BenchmarkReport
import org.gemmaedge.app.model.Load
import org.gemmaedge.app.screens.App
import org.gemmaedge.app.screens.SystemActions
import org.gemmaedge.app.screens.Theme

/** Shows the app's screens, and asks the system for what they need of it. */
class MainActivity : ComponentActivity(), SystemActions {
    private val model get() = (application as GemmaEdge).model
    private val documents by lazy { Documents(applicationContext.contentResolver) }

    // What runs on after this activity gets the documents, and not the activity that holds them.
    private val folders = registerForActivityResult(OpenDocumentTree()) { tree: Uri? ->
        val documents = documents
        if (tree != null) model.models.import { documents.folder(tree) }
    }
    private val files = registerForActivityResult(OpenMultipleDocuments()) { chosen: List<Uri> ->
        val documents = documents
        if (chosen.isNotEmpty()) model.models.import { documents.files(chosen) }
    }
    private val pictures = registerForActivityResult(PickVisualMedia()) { picture: Uri? ->
        val documents = documents
        if (picture != null) model.chat.attach { documents.read(picture).use { it.readBytes() } }
    }

    override fun onCreate(savedInstanceState: Bundle?) {
        enableEdgeToEdge()
        super.onCreate(savedInstanceState)
        setContent {
            Theme { App(model, this) { enabled, onBack -> BackHandler(enabled, onBack) } }
            KeepScreenOn()
        }
    }

    override fun onResume() {
        super.onResume()
        model.models.refresh() // a push may have come meanwhile
    }

    override fun pickFolder() = folders.launch(null)

    override fun pickFiles() = files.launch(arrayOf("*/*"))

    override fun pickPicture() = pictures.launch(PickVisualMediaRequest(PickVisualMedia.ImageOnly))

    override fun share(report: BenchmarkReport) {
        val send = Intent(Intent.ACTION_SEND).setType("text/plain").putExtra(Intent.EXTRA_TEXT, report.toJson())
        startActivity(Intent.createChooser(send, getString(R.string.share)))
    }

    override fun thumbnail(bytes: ByteArray): ImageBitmap? = AndroidPictures.thumbnail(bytes)

    /** While something is imported, loaded or computed: with the screen off, Android soon stops an app and its network. */
    @Composable
    private fun KeepScreenOn() {
        val busy by remember { model.host.busy }.collectAsState(false)
        val load by model.host.load.collectAsState()
        val models by model.models.state.collectAsState()
        val works = busy || load is Load.Loading || models.progress != null
        val view = LocalView.current
        DisposableEffect(view, works) {
            view.keepScreenOn = works
            onDispose { view.keepScreenOn = false }
        }
    }
}
