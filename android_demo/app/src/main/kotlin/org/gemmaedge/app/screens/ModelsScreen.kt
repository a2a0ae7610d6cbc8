package org.gemmaedge.app.screens

import androidx.compose.foundation.layout.Arrangement
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.FlowRow
import androidx.compose.foundation.layout.PaddingValues
import androidx.compose.foundation.layout.Row
import androidx.compose.foundation.layout.fillMaxSize
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.padding
import androidx.compose.foundation.lazy.LazyColumn
import androidx.compose.foundation.lazy.items
import androidx.compose.foundation.text.KeyboardActions
import androidx.compose.foundation.text.KeyboardOptions
import androidx.compose.material3.AlertDialog
import androidx.compose.material3.Button
import androidx.compose.material3.Card
import androidx.compose.material3.MaterialTheme
import androidx.compose.material3.OutlinedButton
import androidx.compose.material3.OutlinedTextField
import androidx.compose.material3.Text
import androidx.compose.material3.TextButton
import androidx.compose.runtime.Composable
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.remember
import androidx.compose.runtime.saveable.rememberSaveable
import androidx.compose.runtime.setValue
import androidx.compose.ui.Alignment
import androidx.compose.ui.Modifier
import androidx.compose.ui.text.input.ImeAction
import androidx.compose.ui.text.input.KeyboardType
import androidx.compose.ui.text.style.TextOverflow
import androidx.compose.ui.unit.dp
import org.gemmaedge.app.model.FormatRow
import org.gemmaedge.app.model.ImportProgress
import org.gemmaedge.app.model.Load
import org.gemmaedge.app.model.ModelRow
import org.gemmaedge.app.model.ModelsState
import org.gemmaedge.app.model.readable

/** What the screen of models lets the user do. */
interface ModelsActions {
    fun load(name: String, format: String)

    fun unload()

    fun delete(row: ModelRow)

    fun importFolder()

    fun importFiles()

    fun importUrl(url: String)

    fun stopImport()

    fun dismiss()
}

@Composable
fun ModelsScreen(state: ModelsState, load: Load, actions: ModelsActions) {
    var deleting by remember { mutableStateOf<ModelRow?>(null) }
    LazyColumn(
        Modifier.fillMaxSize(),
        contentPadding = PaddingValues(16.dp),
        verticalArrangement = Arrangement.spacedBy(12.dp),
    ) {
        (load as? Load.Empty)?.sentence?.let { item { Message(it, isError = true, onDismiss = null) } }
        state.message?.let { item { Message(it, isError = false, onDismiss = actions::dismiss) } }
        if (state.rows.isEmpty()) {
            item { Text("No model is on this phone yet. Add one below.", style = MaterialTheme.typography.bodyLarge) }
        }
        items(state.rows, key = { "${it.name}/${it.unfinished}" }) { row ->
            ModelCard(row, load, actions, onDelete = { deleting = row })
        }
        item { AddModel(state.progress, actions) }
    }
    deleting?.let { row ->
        AlertDialog(
            onDismissRequest = { deleting = null },
            title = { Text("Delete ${row.name}?") },
            text = { Text("This frees ${readable(row.bytes)}. Conversations stay.") },
            confirmButton = {
                TextButton({
                    actions.delete(row)
                    deleting = null
                }) { Text("Delete") }
            },
            dismissButton = { TextButton({ deleting = null }) { Text("Keep") } },
        )
    }
}

@Composable
private fun ModelCard(
    row: ModelRow, load: Load, actions: ModelsActions, onDelete: () -> Unit,
) = Card(Modifier.fillMaxWidth()) {
    Column(Modifier.padding(start = 16.dp, bottom = 12.dp, end = 4.dp)) {
        Row(verticalAlignment = Alignment.CenterVertically) {
            Text(
                row.name,
                Modifier.weight(1f).padding(top = 12.dp, bottom = 4.dp),
                style = MaterialTheme.typography.titleMedium,
                maxLines = 2,
                overflow = TextOverflow.Ellipsis,
            )
            Tool(Icons.Delete, "Delete ${row.name}", onClick = onDelete)
        }
        Column(Modifier.padding(end = 12.dp), verticalArrangement = Arrangement.spacedBy(8.dp)) {
            val problem = row.problem
            when {
                row.unfinished -> Secondary(
                    "Import cut short; ${readable(row.bytes)} are here. Import the same address again to go on.",
                )
                problem != null -> Text(problem, color = MaterialTheme.colorScheme.error)
                else -> Secondary(
                    listOfNotNull(
                        readable(row.bytes), row.recipe, "context ${row.context}", "pictures".takeIf { row.vision },
                    ).joinToString(" · "),
                )
            }
            for (format in row.formats) FormatLine(row.name, format, load, actions)
        }
    }
}

@Composable
private fun FormatLine(name: String, row: FormatRow, load: Load, actions: ModelsActions) = Column {
    val loading = load is Load.Loading && load.name == name && load.format == row.format
    val ready = load is Load.Ready && load.name == name && load.format == row.format
    Row(verticalAlignment = Alignment.CenterVertically) {
        Column(Modifier.weight(1f).padding(end = 8.dp)) {
            Text(".${row.format}, ${readable(row.bytes)}", style = MaterialTheme.typography.labelLarge)
            Text(
                if (ready) "In memory." else row.sentence,
                style = MaterialTheme.typography.bodySmall,
                color = if (row.fits || ready) MaterialTheme.colorScheme.onSurfaceVariant else MaterialTheme.colorScheme.error,
            )
        }
        if (ready) {
            OutlinedButton(actions::unload) { Text("Unload") }
        } else {
            Button({ actions.load(name, row.format) }, enabled = row.fits && load !is Load.Loading) { Text("Load") }
        }
    }
    if (loading) Progress("Loading", share = null, onStop = null)
}

@Composable
private fun AddModel(progress: ImportProgress?, actions: ModelsActions) = Column(
    Modifier.padding(top = 8.dp), verticalArrangement = Arrangement.spacedBy(8.dp),
) {
    var url by rememberSaveable { mutableStateOf("") }
    Text("Add a model", style = MaterialTheme.typography.titleMedium)
    if (progress != null) {
        val words = if (progress.total == 0L) "Reading the manifest" else
            "${progress.file}: ${readable(progress.done)} of ${readable(progress.total)}"
        Progress(words, if (progress.total == 0L) null else progress.done.toFloat() / progress.total, actions::stopImport)
        return@Column
    }
    FlowRow(horizontalArrangement = Arrangement.spacedBy(8.dp)) {
        OutlinedButton(actions::importFolder) { Text("From a folder") }
        OutlinedButton(actions::importFiles) { Text("From files") }
    }
    OutlinedTextField(
        url, { url = it }, Modifier.fillMaxWidth(),
        label = { Text("Address of a bundle's folder") },
        placeholder = { Text("https://") },
        singleLine = true,
        keyboardOptions = KeyboardOptions(keyboardType = KeyboardType.Uri, imeAction = ImeAction.Go),
        keyboardActions = KeyboardActions(onGo = { if (url.isNotBlank()) actions.importUrl(url) }),
        trailingIcon = { TextButton({ actions.importUrl(url) }, enabled = url.isNotBlank()) { Text("Get") } },
    )
    Secondary("Or from a laptop: gemma-edge push BUNDLE. Every file is compared with the manifest's sha256.")
}

@Composable
internal fun Secondary(text: String) =
    Text(text, style = MaterialTheme.typography.bodySmall, color = MaterialTheme.colorScheme.onSurfaceVariant)
