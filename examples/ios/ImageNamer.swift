// Names pictures and camera frames on iOS with Core ML. Drag model.fp16.mlpackage of `prgkit export --coreml --fp16` into
// Xcode's project, and the bundle's manifest.json. Never compiled where it was written.
import CoreML
import CoreVideo
import Foundation
import Vision

/// An open model; use it from one queue, such as that of AVCaptureVideoDataOutput.
final class ImageNamer {
    struct Answer {
        let name: String
        let probability: Float
    }

    private struct Manifest: Decodable {
        struct Preprocessing: Decodable { let crop: Double; let squash: Bool }
        struct Confidence: Decodable { let temperature: Float }
        let preprocessing: Preprocessing
        let confidence: Confidence?
    }

    private let model: VNCoreMLModel
    private let manifest: Manifest

    init(modelName: String = "model.fp16") throws {
        guard let compiled = Bundle.main.url(forResource: modelName, withExtension: "mlmodelc"),
              let manifest = Bundle.main.url(forResource: "manifest", withExtension: "json")
        else { throw CocoaError(.fileNoSuchFile) }
        let options = MLModelConfiguration()
        options.computeUnits = .all  // the Neural Engine where there is one
        model = try VNCoreMLModel(for: MLModel(contentsOf: compiled, configuration: options))
        self.manifest = try JSONDecoder().decode(Manifest.self, from: Data(contentsOf: manifest))
    }

    /// The likeliest classes of a photograph, the first first.
    func name(_ image: CGImage, orientation: CGImagePropertyOrientation = .up, count: Int = 3) throws -> [Answer] {
        try answers(VNImageRequestHandler(cgImage: image, orientation: orientation), count)
    }

    /// The likeliest classes of a frame of the camera, in captureOutput(_:didOutput:from:).
    func name(_ frame: CVPixelBuffer, orientation: CGImagePropertyOrientation, count: Int = 3) throws -> [Answer] {
        try answers(VNImageRequestHandler(cvPixelBuffer: frame, orientation: orientation), count)
    }

    private func answers(_ handler: VNImageRequestHandler, _ count: Int) throws -> [Answer] {
        let request = VNCoreMLRequest(model: model)
        if manifest.preprocessing.squash {
            request.imageCropAndScaleOption = .scaleFill
        } else {  // the share of the picture that a student was shown in training; Vision crops its middle
            let crop = manifest.preprocessing.crop
            request.imageCropAndScaleOption = .centerCrop
            request.regionOfInterest = CGRect(x: (1 - crop) / 2, y: (1 - crop) / 2, width: crop, height: crop)
        }
        try handler.perform([request])
        let found = request.results as? [VNClassificationObservation] ?? []
        let shares = found.map { pow($0.confidence, 1 / (manifest.confidence?.temperature ?? 1)) }  // calibrated
        let sum = shares.reduce(0, +)
        return zip(found, shares).prefix(count).map { Answer(name: $0.identifier, probability: $1 / sum) }
    }
}
